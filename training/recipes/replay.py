"""Learn the answers without unlearning the rest: a fixed share of the rows is what the model could do before.

Of N rows in all, `share` N are replayed: general chat as far as it was given, and beyond that the base model's own answers to
free questions, as often as it takes. *Replay to Remember: Continual Layer-Specific Fine-tuning for German Speech Recognition*
keeps old abilities with such a share; *Balancing Specialized and General Skills in LLMs: The Impact of Modern Tuning and Data
Strategy* weighs it against what is gained. `lora-sft` takes all of the general chat and each own answer a few times, however
many rows there are: with thousands of them that is a share of nearly nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from ...errors import InvalidRequest
from ..tuning.bench import Bench
from . import Material, Recipe, lora_sft


@dataclass(frozen=True, slots=True)
class Options(lora_sft.Options):
    """`share` of all rows are replayed."""

    share: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InvalidRequest(f"replay needs a share between 0 and 1, not {self.share}.", hint="Default: 0.3.")


def train(bench: Bench, material: Material, options: Options) -> dict[str, Any]:
    """Learn the answers beside a fixed share of general ones, against forgetting."""
    taught = bench.rows(material.tasks, instructions=options.instructions)
    wanted = round(len(taught) * options.share / (1 - options.share))
    given = random.Random(options.seed).sample(material.general, min(wanted, len(material.general)))
    replayed = bench.rows(given)
    if own := bench.rehearsed(material.domain) if len(replayed) < wanted else []:
        replayed += [own[at % len(own)] for at in range(wanted - len(replayed))]
    counted = {"replayed": {"given": len(given), "own": len(replayed) - len(given)}}
    return {**bench.tune([*taught, *replayed], options)[1], **counted}


RECIPE = Recipe(Options, train)
