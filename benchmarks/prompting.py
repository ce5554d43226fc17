"""The base model prompted as well as it can be: the words and the number of solved rows that are best on rows set aside."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from collegium.schema import Message
from collegium.training.measuring.evaluate import LOWER_IS_BETTER, Put
from collegium.training.measuring.gate import JUDGED_BY
from collegium.training.rows.examples import Example
from collegium.training.rows.wording import ask, close_labels, wording_of

DEV_ROWS = 24
SHOTS = (3, 6)
LONGEST_SHOT = 1200
"""Characters of a solved row; longer ones would leave no room."""
Scores = Callable[[Sequence[Example], None, Put], Sequence[Mapping[str, float]]]


@dataclass(frozen=True, slots=True)
class Prompting:
    """The wording that a question is asked in, and solved rows before it."""

    wording: int = 0
    shots: tuple[Example, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether it differs from how experts are asked."""
        return bool(self.shots or self.wording)

    def of(self, rows: Sequence[Example]) -> tuple[list[Example], None, Put]:
        """The rows with the solved ones as turns before them, nobody's adapter, and what puts them into other words."""
        turns = [
            turn
            for shot in self.shots
            for turn in (Message("user", ask(shot, wording=self.wording)), Message("assistant", shot.answer))
        ]
        words = {ask(row): ask(row, wording=self.wording) for row in rows}
        return [replace(row, history=tuple(turns)) for row in rows], None, lambda text: words[text]

    def __str__(self) -> str:
        return f"wording {self.wording + 1}, {len(self.shots)} solved rows"


def best_prompting(training: Sequence[Example], scores: Scores) -> Prompting:
    """The best wording without solved rows, then the best number of solved rows in it."""
    rows = close_labels(random.Random(3).sample(list(training), len(training)), training)
    dev, others = rows[:DEV_ROWS], rows[DEV_ROWS:]
    short = [row for row in others if len(ask(row)) + len(row.answer) < LONGEST_SHOT]

    def reached(prompting: Prompting) -> float:
        found = scores(*prompting.of(dev))
        metric = next(name for names in JUDGED_BY for name in names if name in found[0])
        value = float(np.mean([score[metric] for score in found]))
        return -value if metric in LOWER_IS_BETTER else value

    wording = max(range(len(wording_of(dev[0]).wordings)), key=lambda one: reached(Prompting(one)))
    return max((Prompting(wording, tuple(short[:shots])) for shots in (0, *SHOTS)), key=reached)
