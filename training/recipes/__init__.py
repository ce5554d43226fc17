"""Recipes: how an adapter is trained, one file each, found by name.

A plug-in adds one through the entry point `collegium.recipes`, which names a `Recipe`; docs/recipes.md has an example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from importlib.util import find_spec
from inspect import getdoc
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ...errors import InvalidRequest
from ...plugins import find
from ..rows.examples import Example
from ..watch import Progress as Progress

if TYPE_CHECKING:
    from ..tuning.bench import Bench

BUILT_IN = {
    "lora-sft": "training.recipes.lora_sft:RECIPE",
    "cpt-sft": "training.recipes.cpt_sft:RECIPE",
    "lora-dpo": "training.recipes.lora_dpo:RECIPE",
    "replay": "training.recipes.replay:RECIPE",
    "refusal-aware": "training.recipes.refusal_aware:RECIPE",
}
NEEDED = ("accelerate", "datasets", "trl")
"""What the extra `train` installs."""
GROUP = "collegium.recipes"

Need = Literal["tasks", "preferences", "texts"]
Chosen = TypeVar("Chosen")


@dataclass(frozen=True, slots=True)
class Row:
    """One training row as token ids: the answer's tokens are the last `len(answer)` of the sequence.

    Those of them are learned that `learned` says, one truth value for each; all of them where it is empty.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    learned: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True, slots=True)
class Material:
    """What there is to learn a domain from: its rows, general chat, and raw texts."""

    domain: str
    tasks: tuple[Example, ...] = ()
    general: tuple[Example, ...] = ()
    texts: tuple[str, ...] = ()

    def has(self, need: Need) -> bool:
        """Whether there is something of a kind."""
        if need == "preferences":
            return any(row.rejected for row in self.tasks)
        return bool(self.tasks if need == "tasks" else self.texts)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to train: `train` takes a bench, what there is to learn from and its `options`, and returns a report.

    It leaves a PEFT folder in `bench.folder / "adapter"`, which `bench.tune` and `bench.fit` do. `options` is a dataclass,
    as a rule a subclass of `Tuning`; `needs` is what it cannot work without.
    """

    options: type
    train: Callable[[Bench, Material, Any], dict[str, Any]]
    needs: tuple[Need, ...] = ("tasks",)

    @property
    def about(self) -> str:
        """What it does, in a sentence."""
        return (getdoc(self.train) or "").partition("\n")[0]

    def check(self, material: Material) -> None:
        """Raises InvalidRequest where there is nothing of what it needs."""
        for need in self.needs:
            if not material.has(need):
                raise InvalidRequest(f"This recipe needs {LACKING[need][0]}.", hint=LACKING[need][1])


LACKING: Mapping[Need, tuple[str, str]] = {
    "tasks": ("examples", "Give some with --examples, or documents to mine them from with --docs."),
    "preferences": ("preference pairs", "Give examples with `rejected`, an answer that `answer` is preferred to."),
    "texts": ("raw texts", "Give documents with --docs."),
}


def load_recipe(name: str) -> Recipe:
    """The recipe of this name; raises InvalidRequest that lists the known ones, or says what is not installed."""
    missing = [package for package in NEEDED if find_spec(package) is None]
    if name in BUILT_IN and missing:
        raise InvalidRequest(
            f"Training needs {', '.join(missing)}, not installed here.", hint="pip install 'collegium[train]'"
        )
    recipe = find(GROUP, name, BUILT_IN, f"There is no recipe {name!r}.")
    if not isinstance(recipe, Recipe):
        raise InvalidRequest(f"{name} is a {type(recipe).__name__}, not a Recipe.", hint="Its package is out of date.")
    return recipe


def known() -> tuple[str, ...]:
    """The names of all recipes, built in or plugged in."""
    return tuple(sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=GROUP))}))


def parse_options(recipe: str, options: type[Chosen], given: Mapping[str, Any]) -> Chosen:
    """The options of a recipe, checked: whole numbers are positive (but a seed may be 0), others are not negative.

    Raises InvalidRequest for one that is unknown or of another kind, and what `options` itself raises.
    """
    names = {field.name: field for field in fields(options)}  # type: ignore[arg-type]  # a dataclass, says `Recipe`
    if unknown := sorted(set(given) - set(names)):
        raise InvalidRequest(
            f"{recipe} has no option {', '.join(unknown)}.", hint=f"Known: {', '.join(sorted(names))}."
        )
    for name, value in given.items():
        kind = type(names[name].default)
        if not _fits(value, kind) or (kind is int and name != "seed" and value < 1):
            raise InvalidRequest(
                f"{recipe} needs {name} to be {KINDS.get(kind, 'a text')}, not {value!r}.",
                hint=f"Default: {names[name].default}.",
            )
    return options(**given)


KINDS = {bool: "true or false", int: "a positive whole number", float: "a number that is not negative"}


def _fits(value: Any, kind: type) -> bool:
    if kind in (bool, str) or isinstance(value, bool):
        return isinstance(value, kind) and (kind in (bool, str))
    if not isinstance(value, (int, float) if kind is float else int):
        return False
    return 0 <= value < float("inf")
