"""From documents or examples to a measured, registered, live expert: the stages of a training job.

intake > documents > mine > train > measure > gate > register. What is finished is on the disk and is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import GateRefused, InvalidRequest
from ..experts.home import Home
from ..experts.kinds import closing_host
from ..models.cache import CachedModel
from ..models.chat import ChatEncoder
from ..models.encoder import Encoder
from ..models.load import load_tokenizer
from ..schema import Card, Evidence, Score, digest
from ..settings import Settings
from .documents.asking import AskModel
from .documents.mining import mine, texts_of
from .documents.reading import comprehension
from .domain import NewDomain, read_prompts
from .measuring.gate import Verdict, Verdicts, decide
from .measuring.lookup import lookup
from .measuring.measure import Measured, measure
from .plan import Plan, digest_of, plan_from_dict, training_folder
from .recipes import Material, load_recipe, parse_options
from .register import check_names, live_lora, register
from .routing.fit_router import refit
from .rows.curate import curate
from .rows.examples import Example, from_json, to_json
from .rows.intake import Taken, take_in
from .rows.split import split
from .stages import Stages
from .tuning.bench import Bench
from .watch import Watch

ROUTER_PROMPTS = 400
"""Prompts that the router learns a new domain from, at most."""
FROM_DOCUMENTS = "qa.json"
FEWEST_MINED = 40
"""Question-answer pairs of documents that are worth training on: of fewer, none could be measured with."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job: the card that is live for the name, the gate's word on the adapter if there is one, and the report."""

    card: Card
    verdicts: Verdicts | None
    report: dict[str, Any]


def work(plan: dict[str, Any], home: Home, watch: Watch, *, folder: Path) -> dict[str, Any]:
    """Work off a plan as a job; returns the report. Raises what `train_expert` raises.

    The stages are the plan's and not in the job's `folder`: the same plan goes on in another job, forced perhaps.
    """
    return train_expert(plan_from_dict(plan), home, watch).report


def train_expert(plan: Plan, home: Home, watch: Watch) -> Outcome:
    """Train, measure, and register what passes the gate; what is finished already is not done again.

    Documents answer at once, on the expert that is live or on the base model; the adapter follows. Where it is not better, a
    domain with documents stays as it is and the report says so; without documents GateRefused has the numbers, unless the plan
    is forced.
    """
    # What can be wrong is found before hours are spent on it.
    check(plan, home)
    base = home.models.get(home.settings.base_model, watch.progress)
    stages = Stages(training_folder(home.root / "trainings", plan, base))
    watch.progress("reading", 0, 0)
    taken = take_in(plan, stages)
    card = answer_from_documents(plan, home, taken, stages, watch) if taken.documents else None
    taken = with_mined(plan, home, base, taken, stages, watch)
    if card and not taken.training:
        return Outcome(card, None, taken.report | {"live": card.version, "gate": "no adapter was trained"})
    adapter, told = train_adapter(plan, taken, base, stages, home.settings, watch)
    measured = measure_adapter(plan, home, base, adapter, taken, stages, watch)
    verdicts = decide(measured)
    report = taken.report | {"recipe": told, "gate": str(verdicts), "scores": measured.to_dict()}
    if not verdicts.passed and not plan.force:
        refused = f"{plan.name} is {verdicts}. It was not registered; its adapter is in {adapter}."
        if card is None:
            hint = (
                "Add or clean examples; where it forgets, or answers with labels, --recipe replay keeps more. "
                "--force registers it all the same, which its card will say."
            )
            raise GateRefused(refused, hint=hint, report=report)
        live = f"The domain is live with its documents on {'base' if not card.evidence.scores else card.version}."
        return Outcome(card, verdicts, report | {"live": card.version, "refused": f"{refused} {live}"})
    evidence = make_evidence(plan, measured.scores(), verdicts, told)
    domain = new_domain(plan, plan.domain or plan.name, taken.training)
    card = go_live(home, domain, watch, name=plan.name, adapter=adapter, evidence=evidence)
    return Outcome(card, verdicts, report | {"live": card.version})


def check(plan: Plan, home: Home) -> None:
    """Find what can be wrong without reading a row. Raises InvalidRequest or NameTaken."""
    check_names(home, plan.name, plan.domain or plan.name)
    plan.check_files()
    if not (plan.examples or plan.docs):
        raise InvalidRequest("There is nothing to train on.", hint="Give examples or documents.")
    name = plan.recipe or "lora-sft"
    parse_options(name, load_recipe(name).options, plan.options)


def answer_from_documents(plan: Plan, home: Home, taken: Taken, stages: Stages, watch: Watch) -> Card:
    """Have the domain answer from its documents: an index and a router class, on who is live for it or on the base model."""
    name = plan.domain or plan.name

    def going_live(folder: Path) -> dict[str, Any]:
        domain = replace(new_domain(plan, name, taken.training), documents=taken.documents)
        return {"version": go_live(home, domain, watch, name=plan.name).version}

    stages.run("documents", going_live)
    release = home.release()
    if plan.name not in release.aliases:
        raise InvalidRequest(f"{plan.name} was taken out of service since.", hint="Begin anew with another seed.")
    return home.registry.card(release.aliases[plan.name])


def go_live(home: Home, domain: NewDomain, watch: Watch, **what: Any) -> Card:
    """Register, and let the router's head settle where the domain is new to it. Raises what `register` raises."""
    before = home.release().router
    card = register(home, domain, progress=watch.progress, **what)
    if home.release().router != before:
        watch.progress("refitting the router", 0, 0)
        refit(home)
    return card


def with_mined(plan: Plan, home: Home, base: CachedModel, taken: Taken, stages: Stages, watch: Watch) -> Taken:
    """With the question-answer pairs that the documents give, on the sides on which their documents are."""
    if not taken.documents or not plan.mine:
        return taken

    def mining(folder: Path) -> dict[str, Any]:
        read = comprehension(taken.documents, seed=plan.seed, limit=plan.mine)
        with closing_host(home, base) as host:
            encoder = Encoder(home.models.get(home.settings.encoder, watch.progress))
            found = mine(
                taken.documents,
                AskModel(host),
                limit=plan.mine,
                seed=plan.seed,
                progress=partial(watch.progress, "mining questions"),
                embed=encoder.encode,
            )
        rows = curate([*found.examples, *read], held_out=taken.held_out).rows
        (folder / FROM_DOCUMENTS).write_text(json.dumps(to_json(rows)), "utf-8")
        return {"mined": found.report, "rewritten": len(read), "kept": len(rows)}

    folder, report = stages.run("mine", mining)
    rows = from_json(json.loads((folder / FROM_DOCUMENTS).read_text("utf-8")))
    told = taken.report | {"from_documents": report}
    if len(rows) < FEWEST_MINED:
        return replace(taken, report=told)
    if len({row.group for row in rows}) == 1:  # there is nothing else to hold out than parts of the one document
        rows = [replace(row, group="") for row in rows]
    # Rows of test files say what the domain is measured by; without any, what the documents say is held out too.
    training, held_out = (rows, []) if plan.test else split(rows, test_limit=plan.test_limit, seed=plan.seed)
    return replace(
        taken,
        training=(*taken.training, *training),
        held_out=(*taken.held_out, *held_out),
        report=told,
    )


def train_adapter(
    plan: Plan, taken: Taken, base: CachedModel, stages: Stages, settings: Settings, watch: Watch
) -> tuple[Path, dict[str, Any]]:
    """Train with the plan's recipe; returns the PEFT folder and the recipe's report."""
    recipe = load_recipe(recipe_of(plan, taken))
    options: Any = parse_options(recipe_of(plan, taken), recipe.options, plan.options)
    material = Material(
        plan.domain or plan.name, tuple(taken.training), tuple(taken.general), tuple(texts_of(taken.documents))
    )

    def training(folder: Path) -> dict[str, Any]:
        recipe.check(material)
        bench = Bench(base, settings, stages.root, watch, plan.seed)
        return {"name": recipe_of(plan, taken)} | recipe.train(bench, material, options)

    _, report = stages.run("train", training)
    return stages.root / "adapter", report


def recipe_of(plan: Plan, taken: Taken) -> str:
    """The plan's recipe, or the one that fits what there is: preference pairs, documents alone, or examples."""
    if plan.recipe:
        return plan.recipe
    if any(row.rejected for row in taken.training):
        return "lora-dpo"
    return "cpt-sft" if taken.documents and not plan.examples else "lora-sft"


def measure_adapter(
    plan: Plan, home: Home, base: CachedModel, adapter: Path, taken: Taken, stages: Stages, watch: Watch
) -> Measured:
    """The candidate beside the base model and the live expert, on rows that nobody was trained on."""
    name = plan.domain or plan.name
    lora = live_lora(home, name, base)
    live = home.artifacts.verify(lora.adapter) if lora else None

    def measuring(folder: Path) -> dict[str, Any]:
        adapters = {"candidate": adapter, "base": None} | ({"live": live} if live else {})
        chat = ChatEncoder(load_tokenizer(base))
        context = lookup(home, name, chat)
        return measure(name, taken.held_out, base, adapters, home.settings, watch.progress, context=context).to_dict()

    settings = home.settings  # of another precision, or beside another live expert, it is measured again
    identity = [
        settings.precision,
        settings.device,
        str(live),
        home.release().indexes.get(name),
        to_json(taken.held_out),
    ]
    _, report = stages.run(f"measure-{digest(identity)[:12]}", measuring)
    return Measured.of(report)


def make_evidence(
    plan: Plan, scores: tuple[Score, ...], verdict: Verdict | Verdicts, report: Mapping[str, Any]
) -> Evidence:
    """What a card says of a candidate that was measured; `report` is what its training, or its fit, told."""
    return Evidence(
        description=plan.description,
        scores=scores,
        gate=str(verdict),
        forced=not verdict.passed,
        recipe={key: value for key, value in report.items() if key != "losses"},
        data={
            f"{path.parent.name}/{path.name}": digest_of(path)
            for path in (*plan.examples, *plan.docs, *plan.general, *plan.test)
        },
        licence=plan.licence,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def new_domain(plan: Plan, name: str, tasks: Sequence[Example]) -> NewDomain:
    """The plan's domain, with prompts that teach it to the router: the questions given for it, else what it is trained on."""
    prompts = read_prompts(plan.questions) or tuple(example.prompt for example in tasks[:ROUTER_PROMPTS])
    return NewDomain(name, plan.description, prompts=prompts)
