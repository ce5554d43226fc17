"""Questions with what the domain's documents say to them, put as the runtime puts it."""

from __future__ import annotations

from collections.abc import Callable

from ...experts.home import Home
from ...models.chat import ChatEncoder
from ...models.encoder import Encoder
from ...retrieval import Index, fit_passages, with_context
from ...schema import Message


def lookup(home: Home, domain: str, chat: ChatEncoder) -> Callable[[str], str] | None:
    """What makes of a question the same question with the best passages quoted before it; None where there is no index."""
    version = home.release().indexes.get(domain)
    settings = home.settings
    if version is None or not settings.passages:
        return None
    index = Index.load(home.artifacts.verify(version), version)
    encoder = Encoder(home.models.get(settings.encoder))

    def asked(question: str) -> str:
        found = index.search(encoder.encode([question])[0], 3 * settings.passages, settings.passage_score)
        context = fit_passages(found, chat.count, settings.context_tokens, most=settings.passages)
        return with_context((Message("user", question),), context)[-1].content

    return asked
