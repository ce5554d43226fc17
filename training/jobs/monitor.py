"""Who listens to the work of a job: writes down how far it is, and stops it when somebody wants that."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from ...errors import Cancelled, NoSpace, Overloaded
from ..watch import Watch
from .losses import Loss, append_loss
from .store import Jobs

WRITES = 0.5
"""Seconds between two notes in the database; the last step of a stage is always noted."""
LOOKS = 0.1
"""Seconds between two looks at whether the job was cancelled."""

log = logging.getLogger(__name__)


class Monitor:
    """Hears of the steps of one job and of its losses."""

    def __init__(self, jobs: Jobs, job_id: str, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._jobs = jobs
        self._job_id = job_id
        self._folder = folder
        self._clock = clock
        self._stage, self._step, self._of = "", 0, 0
        self._loss: float | None = None
        self._began = (0.0, 0)  # when this process began the stage, and at which step
        self._wrote = self._looked = -WRITES
        self._noted = True

    @property
    def watch(self) -> Watch:
        """What the work is given. Its calls raise Cancelled once the job is."""
        return Watch(self._progress, self._heard)

    def flush(self) -> None:
        """Note the last step."""
        if not self._noted:
            self._write(self._clock())

    def _progress(self, stage: str, step: int, of: int) -> None:
        now = self._clock()
        begins = stage != self._stage
        if begins:
            self._stage, self._began = stage, (now, step)
        self._step, self._of, self._noted = step, of, False
        if begins or (of and step >= of) or now - self._wrote >= WRITES:
            self._check(self._write(now))
        else:
            self._look(now)

    def _heard(self, step: int, loss: float) -> None:
        append_loss(self._folder, Loss(self._stage, step, loss))
        self._loss, self._noted = loss, False
        self._look(self._clock())

    def _look(self, now: float) -> None:
        if now - self._looked >= LOOKS:
            self._looked = now
            self._check(self._jobs.wanted(self._job_id))

    def _write(self, now: float) -> bool:
        self._wrote = self._looked = now
        try:
            where = (self._job_id, self._stage, self._step, self._of)
            wanted = self._jobs.advance(*where, loss=self._loss, eta=self._eta(now))
        except (NoSpace, Overloaded) as error:  # hours of work are worth more than a note about them
            log.warning("how far the job is could not be noted: %s", error)
            return True
        self._noted = True
        return wanted

    def _check(self, wanted: bool) -> None:
        if not wanted:
            raise Cancelled(f"The job {self._job_id} was cancelled.")

    def _eta(self, now: float) -> float | None:
        """Seconds that the stage still takes, if the steps to come take as long as those of this process so far."""
        since, first = self._began
        if not self._of or self._step <= first:
            return None
        return (now - since) * (self._of - self._step) / (self._step - first)
