"""One adapter for all tasks: what a team would train that wants no experts."""

from __future__ import annotations

from pathlib import Path

from data import TASKS, TRAINED_ON

from collegium.cli_shared import reporting
from collegium.experts.home import Home
from collegium.models.cache import CachedModel
from collegium.training.recipes import Material, load_recipe, parse_options
from collegium.training.rows.examples import read_examples
from collegium.training.tuning.bench import Bench
from collegium.training.watch import Watch

RECIPE = "lora-sft"
OPTIONS = {"rank": 8, "alpha": 16, "learning_rate": 3e-3, "epochs": 1.0, "max_length": 512}
"""The learning rate was the best of those tried on rows of BANKING77 that were set aside."""


def trained(home: Home, base: CachedModel, data: Path, folder: Path) -> Path:
    """The PEFT folder of the adapter, trained in `folder` where it is not there; one that was stopped goes on."""
    recipe = load_recipe(RECIPE)
    tasks = [
        row
        for domain, names in TASKS.items()
        for name in names
        for row in read_examples([data / domain / f"{name}.train.jsonl.gz"], limit=TRAINED_ON[domain])
    ]
    general = read_examples([data / "general" / "self_instruct.train.jsonl.gz"])
    if not (folder / "adapter").exists():
        with reporting() as progress:
            bench = Bench(base, home.settings, folder, Watch(progress))
            material = Material("general", tuple(tasks), tuple(general))
            recipe.train(bench, material, parse_options(RECIPE, recipe.options, OPTIONS))
    return folder / "adapter"
