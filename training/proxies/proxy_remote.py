"""A black box at a server that is steered, or helped with words: fitted where it tells likelihoods, measured as it answers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...experts.engine.engine import Engine
from ...experts.engine.request import RemoteRow, Row
from ...experts.kinds import Expert, Host
from ...experts.remote.background import spawn
from ...experts.remote.capabilities import Capabilities
from ...experts.remote.client import RemoteClient
from ...experts.remote.demonstrations import store
from ...experts.remote.drafting import Drafter
from ...experts.remote.expert import find_capabilities, open_remote
from ...experts.remote.failures import Spent
from ...experts.remote.row import BlackBox, BlackBoxRow
from ...experts.remote.vocabulary import Vocabulary
from ...models.chat import ChatEncoder
from ...schema import Card, Evidence, ExpertRequest, Lora, Message, Remote, Sampling, digest
from ..documents.asking import say
from ..measuring.answerer import Answerer, SpokenAnswerer, in_turn, tokens_of
from ..measuring.evaluate import LIKELIHOOD_TOKENS, Results, Scorer, answer_of, prompt_of
from ..rows.examples import Example
from ..rows.wording import ask
from .parts import Parts, Prompt
from .proxy_job import Candidate, ProxyJob, Rows, identities

if TYPE_CHECKING:
    from .proxy import ProxyPlan

SHOWN_ROWS = 1000
"""Examples that are kept as demonstrations, at most."""
AT_ONCE = 8
"""Conversations with a server at once."""


def at_server(plan: ProxyPlan, job: ProxyJob, host: Host, rows: Rows) -> Callable[[Lora], Candidate]:
    """Ask the plan's server what it can do; what comes back fits and measures by that, with the small model's adapter.

    Raises what asking it raises, and what opening the small model and `ProxyJob.check_room` raise.
    """
    assert plan.server
    server, small = plan.server, host.models.open(plan.small)
    job.check_room(host, [(small, 2)], [*rows.dev, *rows.test])
    spec = Remote(
        server.url,
        server.model,
        adapter="",
        rank=0,
        key_env=server.key_env,
        small=plan.small,
        identities=identities({plan.small: job.small}),
        mode=server.mode,
        demonstrations=_demonstrations(host, [*rows.tasks, *rows.dev][:SHOWN_ROWS]),
    )
    can = Capabilities() if spec.mode == "text" else find_capabilities(spec, host)
    measured = _by_likelihood if can.top_k else _by_words
    return lambda lora: measured(plan, job, host, _with_adapter(spec, lora), can, rows)


def _by_likelihood(
    plan: ProxyPlan, job: ProxyJob, host: Host, spec: Remote, can: Capabilities, rows: Rows
) -> Candidate:
    parts = _parts(job, host, spec, can, [*rows.dev, *rows.test])
    server, pair = _identity(spec, can), [job.small.identity, spec.adapter]
    fitted = job.fit(parts, rows.dev, [*server, *pair])
    combination = fitted.choose(plan.method)

    def measure(who: str, answerer: Answerer, *identity: str) -> Results:
        return job.measure(who, Scorer(answerer, parts.chat, "closed"), rows.test, identity)

    together = parts.together(combination, rows.test)
    return Candidate(
        spec=partial(_with_adapter, replace(spec, combination=combination)),
        large=measure("the large model", parts.alone("large", rows.test), *server, job.small.identity),
        tuned=measure("the small expert", parts.alone("tuned", rows.test), *pair),
        results=measure("the expert", together, *server, *pair, digest(asdict(combination))),
        fitted=fitted,
        capabilities=can.as_dict(),
    )


def _by_words(plan: ProxyPlan, job: ProxyJob, host: Host, spec: Remote, can: Capabilities, rows: Rows) -> Candidate:
    """All three are compared by what they say. What a server that was not asked can do stands on no card."""
    parts = _parts(job, host, spec, can, [])
    found = can.as_dict() if spec.mode == "auto" else {}
    card = Card(plan.training.name, plan.training.domain, spec, host.base, evidence=Evidence(capabilities=found))
    texts = {tuple(prompt_of(row, parts.chat)): ask(row) for row in rows.test}

    def measure(who: str, answerer: Answerer, *identity: str) -> Results:
        return job.measure(who, Scorer(answerer, parts.chat, "all"), rows.test, identity)

    server, pair = _identity(spec, can), [job.small.identity, spec.adapter]
    by_itself = partial(_server_says, RemoteClient.of(spec, host.settings), parts.chat)
    helped = partial(_expert_says, open_remote(card, host))
    return Candidate(
        spec=partial(_with_adapter, spec),
        large=measure("the large model", SpokenAnswerer(by_itself, texts), *server),
        tuned=measure("the small expert", parts.alone("tuned", rows.test), *pair),
        results=measure("the expert", SpokenAnswerer(helped, texts), *server, *pair, spec.demonstrations),
        capabilities=found,
    )


class Told(Drafter):
    """Drafts the `answer` that is measured, and as any other once something else is drawn."""

    def __init__(self, engine: Engine, row: Row, most: int, answer: Sequence[int]) -> None:
        super().__init__(engine, row, Sampling(max_tokens=LIKELIHOOD_TOKENS), most)
        self._answer = tuple(answer)

    async def draft(self, generated: Sequence[int]) -> tuple[int, ...]:
        """All that is left of the answer but its last token, after which nothing is asked."""
        at = len(generated)
        if tuple(generated) == self._answer[:at] and self._answer[at:-1]:
            return self._answer[at:-1]
        return await super().draft(generated)


def _parts(job: ProxyJob, host: Host, spec: Remote, can: Capabilities, rows: Sequence[Example]) -> Parts:
    """A row of the server's stands beside one of the small model, which completes it. It need not guess the answers of `rows`."""
    small, tuned = host.models.open(spec.small), job.loaded(Lora(spec.adapter, spec.rank))
    box = BlackBox(RemoteClient.of(spec, host.settings), can, Vocabulary.of(host))
    most = host.settings.remote_draft
    answers = {tuple(prompt_of(row, small.chat)): answer_of(row, small.chat) for row in rows}

    def row(prompt: Prompt) -> RemoteRow:
        read = Row(prompt, tuned, small.name)
        drafter = Told(host.engine, read, most, answers.get(tuple(prompt), ())) if most else None
        return BlackBoxRow(box, prompt, Spent(host.settings.remote_calls), drafter)

    return Parts(host, small.chat, row, small.name, small.chat, tuned, tail=True)


def _identity(spec: Remote, can: Capabilities) -> list[str]:
    """What decides how a server answers, as far as one is told."""
    return [spec.url, spec.model, digest(can.as_dict())]


def _expert_says(expert: Expert, questions: Sequence[str], max_tokens: int) -> Iterator[list[int]]:
    sampling = Sampling(max_tokens=max_tokens)
    requests = [ExpertRequest((Message("user", text),), "", sampling=sampling) for text in questions]
    return tokens_of(in_turn((partial(expert.start, request) for request in requests), AT_ONCE))


def _server_says(
    client: RemoteClient, encoder: ChatEncoder, questions: Sequence[str], max_tokens: int
) -> Iterator[list[int]]:
    """Without any help."""
    limit = client.settings.remote_calls
    for start in range(0, len(questions), AT_ONCE):
        asked = questions[start : start + AT_ONCE]
        for future in [spawn(say(client, text, max_tokens, Spent(limit))) for text in asked]:
            yield encoder.text(future.result())


def _demonstrations(host: Host, rows: Sequence[Example]) -> str:
    """The hash of what the mode `text` shows: an expert that steers falls back to it."""
    with tempfile.TemporaryDirectory() as folder:
        store([(ask(row), row.answer) for row in rows], Path(folder))
        return host.artifacts.put(Path(folder))


def _with_adapter(spec: Remote, lora: Lora) -> Remote:
    return replace(spec, adapter=lora.adapter, rank=lora.rank)
