"""From examples to a measured, registered expert that steers a model whose weights stay as they are.

A small model is tuned, how it steers the large one is fitted on rows that it was not tuned on, and the whole is held against
everybody that it could be replaced by: the large model alone, the small expert alone and, where there is one, the large model
tuned directly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..errors import ArtifactCorrupt, GateRefused, InvalidRequest
from ..experts.engine.request import BASE
from ..experts.home import Home
from ..experts.kinds import Host, open_host
from ..experts.remote.client import check_address
from ..models.cache import CachedModel
from ..schema import ARTIFACT, Card
from .evaluate import probes
from .examples import Example, read_examples
from .fit_combination import METHODS
from .gate import Verdicts
from .pipeline import Plan, job_folder, make_evidence, new_domain, split
from .proxy_job import ProxyJob, Rows
from .proxy_local import in_process
from .proxy_remote import at_server
from .recipes import Progress, load_recipe
from .register import Pairing, check_names, register
from .stages import Stages

DEV_ROWS = 300
"""Rows that are kept from training to fit a combination on: at most, and at most one in `DEV_SHARE`."""
DEV_SHARE = 5


@dataclass(frozen=True, slots=True)
class Server:
    """A black box that others serve, as in `schema.Remote`."""

    url: str
    model: str
    key_env: str = ""
    mode: Literal["auto", "text"] = "auto"


@dataclass(frozen=True, slots=True)
class ProxyPlan:
    """Which model is steered by what.

    `training` says what the small model learns; where its domain is empty, the expert is asked for by name alone. `large` and
    `small` are named as in `schema.Proxy`. With an `adapter`, a PEFT folder for the small model, nothing is trained, and the
    examples, which it should not have seen, are there to fit on. `direct` is a PEFT folder for the large model, to compare with.
    With a `server`, that has the large model.
    """

    training: Plan
    small: str = BASE
    large: str = BASE
    adapter: Path | None = None
    direct: Path | None = None
    method: str = "best"
    server: Server | None = None


def proxy_expert(
    plan: ProxyPlan,
    home: Home,
    *,
    force: bool,
    progress: Progress,
    measured: Callable[[Card], None] = lambda card: None,
) -> tuple[Card, Verdicts]:
    """Train, fit, measure, and register what passes the gate; what is finished already is not done again.

    `measured` is shown the card with all numbers before the gate. Raises GateRefused where the expert is not better than both the
    large model and the small expert, unless `force`d.
    """
    training = plan.training
    check(plan, home)
    general = read_examples(training.general)
    tasks, held_out = split(training)
    tasks, dev = set_aside(tasks, training.seed, all_of_them=plan.adapter is not None)
    base = home.models.get(home.settings.base_model, progress)
    with closing_host(home, base) as host:
        small = _small_model(plan, host)
        job = ProxyJob(training, home, small, Stages(_folder(plan, home, small)), progress)
        rows = Rows(tasks, dev, [*held_out, *probes(training.domain or training.name)])
        measured_with = (at_server if plan.server else in_process)(plan, job, host, rows)
        lora, report = job.adapter(plan.adapter, tasks, general)
        candidate = measured_with(lora)
    verdicts = candidate.verdicts
    evidence = make_evidence(training, candidate.scores, verdicts, report | candidate.fit_report)
    evidence = replace(evidence, capabilities=candidate.capabilities, forced=force and not verdicts.passed)
    measured(Card(training.name, training.domain, candidate.spec(lora), base.identity, evidence=evidence))
    folder = home.artifacts.path(lora.adapter)
    if not verdicts.passed and not force:
        raise GateRefused(
            f"{training.name} is {verdicts}. It was not registered; its adapter is in {folder}.",
            hint="Register who won, or register this one all the same with --force, which its card will say.",
        )
    domain = new_domain(training, training.domain, tasks or dev) if training.domain else None
    card = register(
        home,
        domain,
        name=training.name,
        adapter=folder,
        pairing=Pairing(small, candidate.spec),
        evidence=evidence,
        progress=progress,
    )
    return card, verdicts


@contextmanager
def closing_host(home: Home, base: CachedModel) -> Iterator[Host]:
    """An engine as the home's settings have it, closed at the end. Raises what `open_host` raises."""
    host = open_host(home, base)
    try:
        yield host
    finally:
        host.engine.close()


def check(plan: ProxyPlan, home: Home) -> None:
    """Find what can be wrong before hours are spent on it. Raises InvalidRequest or NameTaken."""
    check_names(home, plan.training.name, plan.training.domain or None)
    if plan.method not in METHODS:
        raise InvalidRequest(f"There is no method {plan.method!r}.", hint=f"Known: {', '.join(METHODS)}.")
    if plan.server and (plan.large != BASE or plan.direct):
        raise InvalidRequest(
            "The large model is at the server.", hint="Leave out the large model, and the adapter to compare with."
        )
    if plan.server:
        check_address(plan.server.url, home.settings)
    if plan.adapter is None:
        load_recipe(plan.training.recipe)
    elif plan.training.general or plan.training.options:
        raise InvalidRequest(
            "Nothing is trained where an adapter is given.", hint="Leave out general chat and options of the recipe."
        )


def set_aside(tasks: Sequence[Example], seed: int, *, all_of_them: bool) -> tuple[list[Example], list[Example]]:
    """Rows to train on and rows to fit on. Raises InvalidRequest where they are too few."""
    shuffled = random.Random(seed).sample(tasks, len(tasks))
    dev = len(tasks) if all_of_them else len(tasks) // DEV_SHARE
    if not dev:
        raise InvalidRequest(
            f"{len(tasks)} examples are too few: some are trained on, on others the combination is fitted.",
            hint=f"Give {DEV_SHARE * 2} at least.",
        )
    dev = min(dev, DEV_ROWS)
    return ([] if all_of_them else shuffled[dev:]), shuffled[:dev]


def _small_model(plan: ProxyPlan, host: Host) -> CachedModel:
    """Raises ArtifactCorrupt where it is a shrunk one that is not here, and what `ModelPool.cached` raises."""
    if plan.small.startswith(ARTIFACT):
        try:
            host.artifacts.path(plan.small.removeprefix(ARTIFACT))
        except ArtifactCorrupt:
            raise ArtifactCorrupt(
                f"The small model {plan.small} is not in {host.artifacts.root}.",
                hint="Make one with `collegium shrink`, and name it with --small or in the setting small_model.",
            ) from None
    return host.models.cached(plan.small)


def _folder(plan: ProxyPlan, home: Home, small: CachedModel) -> Path:
    """Not the folder of `train` with the same plan, which has all rows to train on."""
    folder = job_folder(home.root / "jobs", plan.training, small)
    return folder.with_name(f"{folder.name}-proxy")
