"""From examples to a measured, registered expert."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GateRefused, InvalidRequest
from ..experts.home import Home
from ..models.cache import CachedModel, sha256
from ..models.chat import ChatEncoder
from ..models.load import load_lm, load_tokenizer, pick_device, pick_dtype
from ..schema import Card, Evidence, Score, digest
from ..settings import Settings
from .answerer import TorchAnswerer
from .domain import NewDomain
from .evaluate import Results, Scorer, by_task, compare, probes
from .examples import Example, read_examples
from .gate import FEWEST_ROWS, Verdict, Verdicts, judge
from .prepare import rehearse, token_rows
from .recipes import Progress, Row, load_recipe
from .register import check_names, register
from .stages import Stages
from .wording import close_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HELD_OUT = 10
"""Without test files, one row in so many is held out to measure with."""
ROUTER_PROMPTS = 400
"""Prompts that the router learns a new domain from, at most."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to train, from which files, and how.

    `limit` is the rows taken of each examples file, `test_limit` of each test file.
    """

    name: str
    examples: tuple[Path, ...]
    test: tuple[Path, ...] = ()
    general: tuple[Path, ...] = ()
    domain: str = ""
    description: str = ""
    recipe: str = "lora-sft"
    options: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    limit: int | None = None
    test_limit: int = 100
    seed: int = 17


def job_folder(jobs: Path, plan: Plan, base: CachedModel) -> Path:
    """The folder of the job: the same plan on the same files and base goes on in the same folder."""
    files = {
        kind: [sha256(path) for path in paths]
        for kind, paths in (("examples", plan.examples), ("general", plan.general))
    }
    what = [plan.name, plan.domain, plan.recipe, plan.options, plan.limit, plan.seed, base.identity, files]
    if not plan.test:  # then it decides which rows are held out of the examples
        what.append(plan.test_limit)
    return jobs / f"{plan.name}-{digest(what)[:12]}"


def train_adapter(
    plan: Plan,
    tasks: Sequence[Example],
    general: Sequence[Example],
    base: CachedModel,
    stages: Stages,
    settings: Settings,
    progress: Progress,
) -> tuple[Path, dict[str, Any]]:
    """Rehearse, and train on `tasks` and `general`; returns the PEFT folder and the recipe's report."""
    import torch

    tokenizer = load_tokenizer(base)
    chat, end = ChatEncoder(tokenizer), int(tokenizer.eos_token_id)

    def load() -> PreTrainedModel:
        return load_lm(base, device=pick_device(settings.device), dtype=torch.bfloat16)

    def rehearsal(folder: Path) -> None:
        progress("rehearsing", 0, 0)
        rows = rehearse(load(), chat, end, plan.domain or plan.name)
        (folder / "rows.json").write_text(json.dumps([[row.prompt, row.answer] for row in rows]), "utf-8")

    def training(folder: Path) -> dict[str, Any]:
        rehearsed = [
            Row(tuple(p), tuple(a)) for p, a in json.loads((rehearsed_folder / "rows.json").read_text("utf-8"))
        ]
        rows = token_rows(tasks, general, rehearsed, chat, end, plan.seed)
        recipe = load_recipe(plan.recipe)
        return recipe(load(), tokenizer, rows, folder / "adapter", options=plan.options, progress=progress)

    rehearsed_folder, _ = stages.run("rehearse", rehearsal)
    folder, report = stages.run("train", training)
    return folder / "adapter", report


def split(plan: Plan) -> tuple[list[Example], list[Example]]:
    """Training rows and held-out rows: the test files where the plan names some, else a tenth of the examples."""
    rows = read_examples(plan.examples, limit=plan.limit)
    if plan.test:
        return rows, close_labels(read_examples(plan.test, limit=plan.test_limit), rows)
    shuffled = random.Random(plan.seed).sample(rows, len(rows))
    held_out = min(plan.test_limit, max(len(rows) // HELD_OUT, min(FEWEST_ROWS, len(rows) // 2)))
    if not held_out:
        raise InvalidRequest(
            "One example is too few: some are trained on, others are held out.", hint="Give ten at least."
        )
    return shuffled[held_out:], close_labels(shuffled[:held_out], shuffled[held_out:])


def evaluate_adapter(
    plan: Plan,
    held_out: Sequence[Example],
    base: CachedModel,
    adapter: Path,
    stages: Stages,
    settings: Settings,
    progress: Progress,
) -> tuple[Results, Results]:
    """Results of the candidate and of the base model on the `held_out` rows, in torch's precision for the one that serves."""
    from peft import PeftModel

    def evaluation(folder: Path) -> dict[str, Any]:
        tokenizer = load_tokenizer(base)
        device = pick_device(settings.device)
        model = load_lm(base, device=device, dtype=pick_dtype(settings.precision, device))
        tuned = PeftModel.from_pretrained(model, str(adapter)).eval()
        scorer = Scorer(TorchAnswerer(tuned, int(tokenizer.eos_token_id)), ChatEncoder(tokenizer))
        rows = [*held_out, *probes(plan.domain or plan.name)]
        candidate = by_task(rows, scorer.score(rows, lambda done, of: progress("measuring the expert", done, of)))
        with tuned.disable_adapter():
            reference = by_task(rows, scorer.score(rows, lambda done, of: progress("measuring the base", done, of)))
        return {"candidate": flat(candidate), "base": flat(reference)}

    _, report = stages.run(f"evaluate-{_test_digest(plan)}", evaluation)
    return deep(report["candidate"]), deep(report["base"])


def train_expert(plan: Plan, home: Home, *, force: bool, progress: Progress) -> tuple[Card, Verdict]:
    """Train, measure, and register what passes the gate; what is finished already is not done again.

    Raises GateRefused with the numbers where the candidate is not better than the base, unless `force`d.
    """
    # What can be wrong is found before hours are spent on it.
    check_names(home, plan.name, plan.domain or plan.name)
    load_recipe(plan.recipe)
    tasks, held_out = split(plan)
    general = read_examples(plan.general)
    base = home.models.get(home.settings.base_model, progress)
    stages = Stages(job_folder(home.root / "jobs", plan, base))
    adapter, report = train_adapter(plan, tasks, general, base, stages, home.settings, progress)
    candidate, reference = evaluate_adapter(plan, held_out, base, adapter, stages, home.settings, progress)
    verdict = judge(candidate, reference)
    if not verdict.passed and not force:
        raise GateRefused(
            f"{plan.name} is {verdict}. It was not registered; its adapter is in {adapter}.",
            hint="Add or clean examples, or register it all the same with --force, which its card will say.",
        )
    evidence = make_evidence(plan, compare(candidate, reference), verdict, report)
    domain = new_domain(plan, plan.domain or plan.name, tasks)
    card = register(home, domain, name=plan.name, adapter=adapter, evidence=evidence, progress=progress)
    return card, verdict


def make_evidence(
    plan: Plan, scores: tuple[Score, ...], verdict: Verdict | Verdicts, report: Mapping[str, Any]
) -> Evidence:
    """What a card says of a candidate that was measured; `report` is what its training, or its fit, told."""
    return Evidence(
        description=plan.description,
        scores=scores,
        gate=str(verdict),
        forced=not verdict.passed,
        recipe={"name": plan.recipe, **{key: value for key, value in report.items() if key != "losses"}},
        data={f"{path.parent.name}/{path.name}": sha256(path) for path in (*plan.examples, *plan.general, *plan.test)},
        licence=plan.licence,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def new_domain(plan: Plan, name: str, tasks: Sequence[Example]) -> NewDomain:
    """The plan's domain, with prompts that teach it to the router."""
    prompts = [example.prompt for example in tasks[:ROUTER_PROMPTS]]
    return NewDomain(name, plan.description, prompts=tuple(prompts))


def _test_digest(plan: Plan) -> str:
    return digest([[sha256(path) for path in plan.test], plan.test_limit])[:12]


def flat(results: Results) -> list[list[Any]]:
    """As JSON-ready values; `deep` reads them back."""
    return [[task, metric, values] for (task, metric), values in results.items()]


def deep(rows: list[list[Any]]) -> Results:
    """Read what `flat` wrote."""
    return {(task, metric): values for task, metric, values in rows}
