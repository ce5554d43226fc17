"""Supervised tuning on the answers, beside the base model's own: the recipe for most rows.

The loss of a row with the prompt x and the answer y is -sum_t log p(y_t | x, y_<t). With `instructions` it is that of
*Instruction Tuning With Loss Over Instructions*: the tokens of the question are learned as well, those of the chat template are
not. The paper finds it better where answers are short beside their questions, or rows are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..tuning.bench import Bench
from ..tuning.prepare import REHEARSALS
from ..tuning.tuning import Tuning
from . import Material, Recipe, Row


@dataclass(frozen=True, slots=True)
class Options(Tuning):
    """`instructions` learns the questions too."""

    instructions: bool = False


def rows(bench: Bench, material: Material, options: Options) -> list[Row]:
    """The domain's rows, general chat as it is given, and the base model's own answers to free questions."""
    taught = bench.rows([*material.tasks, *material.general], instructions=options.instructions)
    return [*taught, *bench.rehearsed(material.domain) * REHEARSALS]


def train(bench: Bench, material: Material, options: Options) -> dict[str, Any]:
    """Learn the answers: the way for most rows."""
    return bench.tune(rows(bench, material, options), options)[1]


RECIPE = Recipe(Options, train)
