"""From examples to a measured, registered expert that steers a model whose weights stay as they are.

A small model is tuned, how it steers the large one is fitted on rows that it was not tuned on, and the whole is held against
everybody that it could be replaced by: the large model alone, the small expert alone and, where there is one, the large model
tuned directly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from ...errors import ArtifactCorrupt, GateRefused, InvalidRequest
from ...experts.engine.request import BASE
from ...experts.home import Home
from ...experts.kinds import Host, closing_host
from ...experts.remote.client import check_address
from ...models.cache import CachedModel
from ...schema import ARTIFACT, Card, card_to_dict
from ..measuring.evaluate import probes
from ..measuring.gate import Verdicts
from ..pipeline import make_evidence, new_domain
from ..plan import Plan, plan_from_dict, training_folder
from ..recipes import Progress, load_recipe, parse_options
from ..register import Pairing, check_names, register
from ..rows.examples import Example
from ..rows.intake import take_in
from ..stages import Stages
from ..watch import Watch
from .fit_combination import METHODS
from .proxy_job import ProxyJob, Rows
from .proxy_local import in_process
from .proxy_remote import at_server

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

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; `proxy_plan_from_dict` reads them back."""
        paths = {name: str(path.absolute()) if path else None for name, path in self._paths.items()}
        server = asdict(self.server) if self.server else None
        named = {"small": self.small, "large": self.large, "method": self.method, "server": server}
        return {"training": self.training.to_dict(), **named, **paths}

    @property
    def _paths(self) -> dict[str, Path | None]:
        return {"adapter": self.adapter, "direct": self.direct}


def proxy_plan_from_dict(values: Mapping[str, Any]) -> ProxyPlan:
    """Read what `to_dict` wrote. Raises InvalidRequest where a field is unknown, missing or mistyped."""
    try:
        server = Server(**values["server"]) if values.get("server") else None
        paths = {name: Path(values[name]) for name in ("adapter", "direct") if values.get(name)}
        read = {**values, "adapter": None, "direct": None, **paths, "server": server}
        return ProxyPlan(**{**read, "training": plan_from_dict(values["training"])})
    except (KeyError, TypeError) as error:
        known = ", ".join(field.name for field in fields(ProxyPlan))
        raise InvalidRequest(f"This is no plan of a proxied expert: {error}.", hint=f"Known: {known}.") from None


def work(plan: dict[str, Any], home: Home, watch: Watch, *, folder: Path) -> dict[str, Any]:
    """Work off a plan as a job; the report has the card with all that was measured. Raises what `proxy_expert` raises.

    The stages are the plan's and not in the job's `folder`.
    """
    read = proxy_plan_from_dict(plan)
    shown: list[Card] = []
    force = read.training.force
    try:
        card, verdicts = proxy_expert(read, home, force=force, progress=watch.progress, measured=shown.append)
    except GateRefused as refused:
        report = {"card": card_to_dict(shown[-1])} if shown else {}
        raise GateRefused(refused.message, hint=refused.hint, report=report) from None
    return {"live": card.version, "gate": str(verdicts)}


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
    base = home.models.get(home.settings.base_model, progress)
    with closing_host(home, base) as host:
        small = _small_model(plan, host)
        stages = Stages(_folder(plan, home, small))
        taken = take_in(training, stages)
        tasks, dev = set_aside(taken.training, training.seed, all_of_them=plan.adapter is not None)
        job = ProxyJob(training, home, small, stages, progress)
        rows = Rows(tasks, dev, [*taken.held_out, *probes(training.domain or training.name)])
        measured_with = (at_server if plan.server else in_process)(plan, job, host, rows)
        lora, report = job.adapter(plan.adapter, replace(taken, training=tuple(tasks)))
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
        name = plan.training.recipe or "lora-sft"
        parse_options(name, load_recipe(name).options, plan.training.options)
    elif plan.training.general or plan.training.options:
        raise InvalidRequest(
            "Nothing is trained where an adapter is given.", hint="Leave out general chat and options of the recipe."
        )
    plan.training.check_files()


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
    folder = training_folder(home.root / "trainings", plan.training, small)
    return folder.with_name(f"{folder.name}-proxy")
