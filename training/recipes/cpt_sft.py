"""Continued pre-training on the domain's texts, then its instructions, on one adapter: for a domain whose words the base lacks.

The first stage learns every token of the texts, -sum_t log p(x_t | x_<t), in blocks that are full: an end token stands between
two texts. The second is `lora-sft`, from the adapter that the first left. Knowledge first and tasks second is the way of *Towards
Democratizing Multilingual Large Language Models For Medicine Through A Two-Stage Instruction Fine-tuning Approach* and of the
*Lawyer LLaMA Technical Report*; blocks share a row as in the pre-training of language models, so no token is padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..tuning.bench import Bench
from ..tuning.tuning import LEARNING_RATE
from . import Material, Recipe, lora_sft


@dataclass(frozen=True, slots=True)
class Options(lora_sft.Options):
    """`reading_epochs` are the passes over the texts, 0 by their length; `reading_rate` is the learning rate meanwhile."""

    reading_epochs: float = 0.0
    reading_rate: float = LEARNING_RATE / 2


def train(bench: Bench, material: Material, options: Options) -> dict[str, Any]:
    """Read the domain's texts, then learn its answers: needs documents."""
    reading = replace(options, epochs=options.reading_epochs, learning_rate=options.reading_rate)
    read, told = bench.tune(bench.blocks(material.texts, options.max_length), reading, name="read")
    first = {"tokens": told["tokens"], "seconds": told["seconds"], "losses": told["losses"]}
    return {**bench.tune(lora_sft.rows(bench, material, options), options, start=read)[1], "reading": first}


RECIPE = Recipe(Options, train, needs=("tasks", "texts"))
