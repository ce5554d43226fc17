"""Waiting for a job from another process, and noticing when nobody works on it any more."""

from __future__ import annotations

import time

from ...errors import CollegiumError
from ...experts.home import Home
from ...schema import JobState
from ..watch import Progress
from .store import Jobs
from .worker import ensure_worker, works

EVERY = 0.5
"""Seconds between two looks at the database."""
RESTARTS = 2
"""Workers that are started where they end without an attempt at the job."""


def follow(home: Home, job_id: str, progress: Progress) -> JobState:
    """Wait for the end of a job and return it; `progress` hears of its steps.

    Where its worker has died, another one is started. Raises CollegiumError where workers die before they get to the job, and
    UnknownJob.
    """
    jobs = Jobs(home.registry)
    attempts, restarts = -1, 0
    while True:
        working = works(home)  # before the job is read: a worker that ends has written down what it did
        job = jobs.get(job_id)
        if job.over:
            return job
        if job.attempts != attempts:
            attempts, restarts = job.attempts, 0
        if job.state == "running":
            progress(job.stage or "starting", job.step, job.of)
        else:
            progress("waiting for its turn", 0, 0)
        if not working:
            if restarts == RESTARTS:
                raise CollegiumError(
                    f"Nobody works on the job {job_id}: workers end as soon as they begin.",
                    hint="`collegium jobs log` says why; `collegium jobs work` works here, where you see it.",
                )
            restarts += ensure_worker(home)
        time.sleep(EVERY)
