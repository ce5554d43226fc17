"""The rows and adapters that `proxy.py` compares: for each task one on the small model and one on the large, trained alike.

An adapter that is there already is not trained again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from collegium.models.cache import CachedModel
from collegium.settings import Settings
from collegium.training.recipes import Material, Progress, load_recipe, parse_options
from collegium.training.rows.examples import Example, read_examples
from collegium.training.rows.wording import close_labels
from collegium.training.tuning.bench import Bench
from collegium.training.watch import Watch

TASKS = {
    "banking77": ("finance", ("banking77",)),
    "nl2bash": ("code", ("nl2bash",)),
    "medquad": ("health", ("medquad",)),
    "arc": ("science", ("arc_easy", "arc_challenge")),
}
"""Task -> domain and files, `experts/<domain>/<file>.{train,test}.jsonl.gz` of the data folder."""
TRAIN, FEWER = 1600, {"medquad": 800, "arc": 800}
"""Rows that adapters are trained on; fewer where they are long."""
DEV = 120
"""Rows of the train files that combinations are fitted on."""
RECIPE, OPTIONS = "lora-sft", {"rank": 16, "learning_rate": 1e-3, "epochs": 1.0}


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a task; `dev` and `test` carry the closed set of answers where the task has one."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]


def read_rows(data: Path, task: str, test: int) -> Rows:
    """The same rows every time."""
    domain, files = TASKS[task]
    each = (FEWER.get(task, TRAIN) + DEV) // len(files)
    drawn = read_examples([data / domain / f"{name}.train.jsonl.gz" for name in files], limit=each)
    # Of every file, so that each has its share of both parts.
    dev = [row for at, row in enumerate(drawn) if at % each < DEV // len(files)]
    train = [row for at, row in enumerate(drawn) if at % each >= DEV // len(files)]
    tested = read_examples([data / domain / f"{name}.test.jsonl.gz" for name in files], limit=test // len(files))
    return Rows(train, close_labels(dev, train), close_labels(tested, train))


def adapter(task: str, rows: Rows, model: CachedModel, work: Path, settings: Settings, progress: Progress) -> Path:
    """The PEFT folder of an adapter of `model` for a task."""
    recipe, bench = load_recipe(RECIPE), Bench(model, settings, work, Watch(progress))
    recipe.train(bench, Material(TASKS[task][0], tuple(rows.train)), parse_options(RECIPE, recipe.options, OPTIONS))
    return bench.folder / "adapter"
