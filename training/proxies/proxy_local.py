"""A large model of this process that is steered: fitted, and measured beside all that it could be replaced by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from ...experts.engine.request import Row
from ...experts.engine.slots import Adapter
from ...experts.kinds import Host
from ...models.cache import CachedModel
from ...schema import Combination, Lora, Proxy, digest
from ..measuring.answerer import EngineAnswerer
from ..measuring.evaluate import Results, Scorer
from ..register import live_lora
from .parts import Parts, Prompt
from .proxy_job import Candidate, ProxyJob, Rows, identities

if TYPE_CHECKING:
    from .proxy import ProxyPlan


def in_process(plan: ProxyPlan, job: ProxyJob, host: Host, rows: Rows) -> Callable[[Lora], Candidate]:
    """Open what the plan names; what comes back fits and measures, with the small model's adapter.

    Raises what opening the models raises, and what storing the adapter to compare with and `ProxyJob.check_room` raise.
    """
    large, small = host.models.open(plan.large), host.models.open(plan.small)
    counts = [(large, 3)] if large.name == small.name else [(large, 1), (small, 2)]
    job.check_room(host, counts, [*rows.dev, *rows.test])
    return partial(_measured, plan, job, host, rows, _direct(plan, job, host.models.cached(plan.large)))


def _measured(plan: ProxyPlan, job: ProxyJob, host: Host, rows: Rows, direct: Lora | None, lora: Lora) -> Candidate:
    """The combination of the plan's models, and what it reaches."""
    large, small, whole = host.models.open(plan.large), host.models.open(plan.small), host.models.cached(plan.large)
    parts = Parts(host, large.chat, _row(large.name, None), small.name, small.chat, job.loaded(lora))
    pair = [job.small.identity, lora.adapter]
    fitted = job.fit(parts, rows.dev, [whole.identity, *pair])
    combination = fitted.choose(plan.method)

    def measure(who: str, answerer: EngineAnswerer, *identity: str) -> Results:
        return job.measure(who, Scorer(answerer, parts.chat), rows.test, identity)

    directly = None
    if direct:
        tuned = replace(parts, large=_row(large.name, job.loaded(direct)))
        directly = measure("the tuned model", tuned.alone("large", rows.test), whole.identity, direct.adapter)
    together = parts.together(combination, rows.test)
    return Candidate(
        spec=partial(_spec, plan, identities({plan.large: whole, plan.small: job.small}), combination),
        large=measure("the large model", parts.alone("large", rows.test), whole.identity),
        tuned=measure("the small expert", parts.alone("tuned", rows.test), *pair),
        results=measure("the expert", together, whole.identity, *pair, digest(asdict(combination))),
        direct=directly,
        fitted=fitted,
    )


def _row(model: str, adapter: Adapter | None) -> Callable[[Prompt], Row]:
    return lambda prompt: Row(prompt, adapter, model)


def _spec(plan: ProxyPlan, named: dict[str, str], combination: Combination, lora: Lora) -> Proxy:
    return Proxy(lora.adapter, lora.rank, plan.large, plan.small, named, combination)


def _direct(plan: ProxyPlan, job: ProxyJob, large: CachedModel) -> Lora | None:
    """The adapter of the large model that was given, or that is live for the domain."""
    if plan.direct:
        return job.store(plan.direct, large)
    return live_lora(job.home, job.plan.domain, large)
