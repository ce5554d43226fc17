"""Who is told how a training goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[str, int, int], None]
"""Called with the stage, steps done and steps in all; 0 in all where nobody knows."""


def _unheard(step: int, loss: float) -> None:
    """Nobody listens."""


@dataclass(frozen=True, slots=True)
class Watch:
    """`progress` hears of every step, `loss` of the mean loss over the last steps, with the step's number.

    What they raise stops the work: that is how a job is cancelled.
    """

    progress: Progress
    loss: Callable[[int, float], None] = _unheard
