"""A black box at a server that is steered, or helped with words: fitted where it tells likelihoods, measured as it answers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..experts.engine.request import RemoteRow, Row
from ..experts.kinds import Expert, Host
from ..experts.remote.background import spawn
from ..experts.remote.capabilities import Capabilities
from ..experts.remote.client import RemoteClient
from ..experts.remote.demonstrations import store
from ..experts.remote.drafting import Drafter
from ..experts.remote.expert import find_capabilities, open_remote
from ..experts.remote.failures import Spent
from ..experts.remote.row import BlackBox, BlackBoxRow
from ..experts.remote.text import chat
from ..experts.remote.vocabulary import Vocabulary
from ..models.chat import ChatEncoder
from ..schema import Card, Evidence, ExpertRequest, Lora, Message, Remote, Sampling, digest
from .answerer import Answerer, SpokenAnswerer, in_turn, tokens_of
from .evaluate import LIKELIHOOD_TOKENS, Results, Scorer, prompt_of
from .examples import Example
from .parts import Parts, Prompt
from .proxy_job import Candidate, ProxyJob, Rows, identities
from .wording import ask

if TYPE_CHECKING:
    from .proxy import ProxyPlan

SHOWN_ROWS = 1000
"""Examples that are kept as demonstrations, at most."""
AT_ONCE = 8
"""Conversations with a server at once."""


def at_server(plan: ProxyPlan, job: ProxyJob, host: Host, lora: Lora, rows: Rows) -> Candidate:
    """What the plan's server can do, and what it reaches by that. Raises what asking it raises."""
    assert plan.server
    spec = Remote(
        plan.server.url,
        plan.server.model,
        lora.adapter,
        lora.rank,
        key_env=plan.server.key_env,
        small=plan.small,
        identities=identities({plan.small: job.small}),
        mode=plan.server.mode,
        demonstrations=_demonstrations(host, [*rows.tasks, *rows.dev][:SHOWN_ROWS]),
    )
    can = Capabilities() if spec.mode == "text" else find_capabilities(spec, host)
    if can.top_k:
        return _by_likelihood(plan, job, host, spec, can, rows)
    return _by_words(plan, job, host, spec, can, rows)


def _by_likelihood(
    plan: ProxyPlan, job: ProxyJob, host: Host, spec: Remote, can: Capabilities, rows: Rows
) -> Candidate:
    parts = _parts(job, host, spec, can)
    server, pair = [spec.url, spec.model], [job.small.identity, spec.adapter]
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
    parts = _parts(job, host, spec, can)
    found = can.as_dict() if spec.mode == "auto" else {}
    card = Card(plan.training.name, plan.training.domain, spec, host.base, evidence=Evidence(capabilities=found))
    texts = {tuple(prompt_of(row, parts.chat)): ask(row) for row in rows.test}

    def measure(who: str, answerer: Answerer, *identity: str) -> Results:
        return job.measure(who, Scorer(answerer, parts.chat, "all"), rows.test, identity)

    server, pair = [spec.url, spec.model], [job.small.identity, spec.adapter]
    by_itself = partial(_server_says, RemoteClient.of(spec, host.settings), parts.chat)
    helped = partial(_expert_says, open_remote(card, host))
    return Candidate(
        spec=partial(_with_adapter, spec),
        large=measure("the large model", SpokenAnswerer(by_itself, texts), *server),
        tuned=measure("the small expert", parts.alone("tuned", rows.test), *pair),
        results=measure("the expert", SpokenAnswerer(helped, texts), *server, *pair, spec.demonstrations),
        capabilities=found,
    )


def _parts(job: ProxyJob, host: Host, spec: Remote, can: Capabilities) -> Parts:
    """A row of the server's stands beside one of the small model, which completes it."""
    small, tuned = host.models.open(spec.small), job.loaded(Lora(spec.adapter, spec.rank))
    box = BlackBox(RemoteClient.of(spec, host.settings), can, Vocabulary.of(host))
    most, sampling = host.settings.remote_draft, Sampling(max_tokens=LIKELIHOOD_TOKENS)

    def row(prompt: Prompt) -> RemoteRow:
        drafter = Drafter(host.engine, Row(prompt, tuned, small.name), sampling, most) if most else None
        return BlackBoxRow(box, prompt, Spent(host.settings.remote_calls), drafter)

    return Parts(host, small.chat, row, small.name, small.chat, tuned, tail=True)


def _expert_says(expert: Expert, questions: Sequence[str], max_tokens: int) -> list[list[int]]:
    sampling = Sampling(max_tokens=max_tokens)
    requests = [ExpertRequest((Message("user", text),), "", sampling=sampling) for text in questions]
    return tokens_of(in_turn((partial(expert.start, request) for request in requests), AT_ONCE))


def _server_says(
    client: RemoteClient, encoder: ChatEncoder, questions: Sequence[str], max_tokens: int
) -> list[list[int]]:
    """Without any help."""
    limit, sampling = client.settings.remote_calls, Sampling(max_tokens=max_tokens)

    async def said(text: str) -> str:
        request = ExpertRequest((Message("user", text),), "", sampling=sampling)
        messages = [{"role": "user", "content": text}]
        async with aclosing(chat(client, messages, request, Spent(limit))) as pieces:
            return "".join([piece.text async for piece in pieces])

    answers: list[str] = []
    for start in range(0, len(questions), AT_ONCE):
        futures = [spawn(said(text)) for text in questions[start : start + AT_ONCE]]
        answers += [future.result() for future in futures]
    return [encoder.text(answer) for answer in answers]


def _demonstrations(host: Host, rows: Sequence[Example]) -> str:
    """The hash of what the mode `text` shows: an expert that steers falls back to it."""
    with tempfile.TemporaryDirectory() as folder:
        store([(ask(row), row.answer) for row in rows], Path(folder))
        return host.artifacts.put(Path(folder))


def _with_adapter(spec: Remote, lora: Lora) -> Remote:
    return replace(spec, adapter=lora.adapter, rank=lora.rank)
