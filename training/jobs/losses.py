"""The losses of a job: appended to a file beside it, so that the curve survives whatever ends the process."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "losses.jsonl"


@dataclass(frozen=True, slots=True)
class Loss:
    """The mean loss over the steps up to `step` of a stage; None where it was no number."""

    stage: str
    step: int
    loss: float | None


def append_loss(folder: Path, loss: Loss) -> None:
    """Write down a loss of the job whose folder this is."""
    row = asdict(loss) | {"loss": loss.loss if loss.loss is not None and math.isfinite(loss.loss) else None}
    # A process that was killed in mid-line leaves half a line: each row begins one of its own.
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(row))


def read_losses(folder: Path) -> list[Loss]:
    """The losses of a job, in order. Of a stage that was begun again, what came after the step where it was is forgotten."""
    try:
        text = (folder / FILE).read_text("utf-8", "replace")
    except FileNotFoundError:
        return []
    stages: dict[str, list[Loss]] = {}
    for loss in _whole_rows(text.splitlines()):
        rows = stages.setdefault(loss.stage, [])
        while rows and rows[-1].step >= loss.step:
            rows.pop()
        rows.append(loss)
    return [loss for rows in stages.values() for loss in rows]


def _whole_rows(lines: Iterable[str]) -> Iterable[Loss]:
    for line in lines:
        try:
            yield Loss(**json.loads(line))
        except (ValueError, TypeError):  # half a line
            continue
