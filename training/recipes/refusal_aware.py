"""Teach the model to know what it knows, as *R-Tuning: Teaching Large Language Models to Refuse Unknown Questions* does.

The base model answers the training questions. Where its answer agrees with the row's, the question is known to it, else
unknown. Each answer is then completed by how sure the model should be, "I am sure." or "I am unsure."; with `refuse`, the answer
to an unknown question is a refusal instead. What is taught as certain is what the model could tell before, so it has no reason
to make things up.

Agreement is that of the texts for short answers, and F1 over their words of `agreement` or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..measuring.evaluate import same_text, token_f1
from ..rows.examples import Example
from ..rows.wording import ask
from ..tuning.bench import Bench
from ..tuning.prepare import REHEARSALS
from ..tuning.tuning import Tuning
from . import Material, Recipe

SURE, UNSURE = "I am sure.", "I am unsure."
REFUSAL = "I do not know the answer to that."


@dataclass(frozen=True, slots=True)
class Options(Tuning):
    """`agreement` makes an answer that of the row; `refuse` replaces the answers to unknown questions."""

    agreement: float = 0.5
    refuse: bool = False


def train(bench: Bench, material: Material, options: Options) -> dict[str, Any]:
    """Learn the answers with how sure to be of them, by what the base model knows."""
    told = bench.answers([ask(example) for example in material.tasks])
    known = [agree(answer, row, options.agreement) for answer, row in zip(told, material.tasks, strict=True)]
    rows = [*bench.rows(certain(material.tasks, known, options)), *bench.rows(material.general)]
    rows += bench.rehearsed(material.domain) * REHEARSALS
    counted = {"known": sum(known), "unknown": len(known) - sum(known)}
    return {**bench.tune(rows, options)[1], **counted}


def agree(answer: str, row: Example, enough: float) -> bool:
    """Whether the model's answer is the row's."""
    return same_text(answer, row.answer, case=False) or token_f1(answer.casefold(), row.answer.casefold()) >= enough


def certain(rows: Sequence[Example], known: Sequence[bool], options: Options) -> list[Example]:
    """The rows with answers that say how sure to be."""

    def answer(row: Example, is_known: bool) -> str:
        if options.refuse and not is_known:
            return REFUSAL
        return f"{row.answer.rstrip()} {SURE if is_known else UNSURE}"

    return [replace(row, answer=answer(row, is_known)) for row, is_known in zip(rows, known, strict=True)]


RECIPE = Recipe(Options, train)
