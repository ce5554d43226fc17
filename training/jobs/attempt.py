"""One attempt at one job, in a process of its own: at low priority, within limits, and with a sentence for each way to end."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ...errors import Cancelled, CollegiumError, GateRefused, NoSpace, Overloaded
from ...experts.home import Home
from ...models.space import FULL, no_space
from ...plugins import find
from ...schema import JobState, Standing
from ...settings import Settings
from ..watch import Watch
from .lock import WorkerLock
from .monitor import Monitor
from .store import Jobs
from .worker import job_folder, start_logging, training_threads

WORK = {"train": "training.pipeline:work", "proxy": "training.proxies.proxy:work"}
"""The kinds of work, by what does it."""
GROUP = "collegium.jobs"
NICE = 10
"""How far the process steps back behind others."""
PATIENCE = 300.0
"""Seconds that an end waits to be written down while the disk is full."""
_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "can't start new thread", "bad_alloc")

log = logging.getLogger(f"{__package__}.attempt")  # run as a program, its name is another


class Work(Protocol):
    """Does a job's work and returns its report. Run again in the same `folder` it goes on from its last finished stage."""

    def __call__(self, plan: dict[str, Any], home: Home, watch: Watch, *, folder: Path) -> dict[str, Any]:
        """Raises GateRefused where what was made is not good enough, and other CollegiumErrors."""
        ...


def attempt(home: Home, job: JobState) -> JobState:
    """Work on a job that was taken, and write down how it ended. KeyboardInterrupt puts it back and goes through."""
    jobs, folder = Jobs(home.registry), job_folder(home, job.id)
    folder.mkdir(parents=True, exist_ok=True)
    monitor = Monitor(jobs, job.id, folder)
    state: Standing = "done"
    error: str | None = None
    report: dict[str, Any] = {}
    try:
        work: Work = find(GROUP, job.kind, WORK, f"There is no job of the kind {job.kind!r}.")
        report = work(dict(job.plan), home, monitor.watch, folder=folder)
        monitor.flush()
        return _patiently(lambda: jobs.end(job.id, "done", report=report))
    except KeyboardInterrupt:
        _patiently(lambda: jobs.put_back(job.id))
        raise
    except Cancelled as ending:
        state, error = "cancelled", str(ending)
    except GateRefused as ending:
        state, error, report = "refused", str(ending), ending.report
    except CollegiumError as ending:
        state, error = "failed", str(ending)
    except Exception as ending:  # the process's edge: whatever it was, the job says so and the queue goes on
        log.exception("job %s failed", job.id)
        state, error = "failed", str(_explain(ending, home, job.id))
    _lift_memory()
    return _patiently(lambda: jobs.end(job.id, state, error=error, report=report))


def _explain(error: Exception, home: Home, job_id: str) -> CollegiumError:
    for one in _causes(error):
        said = f"{type(one).__name__}: {one}".lower()
        number = one.errno if isinstance(one, OSError) else None
        if number in FULL or os.strerror(errno.ENOSPC).lower() in said:
            return no_space(job_folder(home, job_id))
        if isinstance(one, MemoryError) or number == errno.ENOMEM or any(words in said for words in _MEMORY):
            return _no_memory(home.settings)
    where = f"`collegium jobs log {job_id}` has the details; please report them."
    return CollegiumError(f"It failed unexpectedly: {type(error).__name__}: {error}.", hint=where)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _no_memory(settings: Settings) -> CollegiumError:
    bound = settings.training_memory_mb
    within = f" within the {bound} MB of training_memory_mb" if bound else ""
    more = "Raise that setting, or train" if bound else "Close other programs, or train"
    hint = (
        f"{more} with smaller batches or shorter rows; what is finished is kept, and `collegium jobs resume` goes on."
    )
    return CollegiumError(f"The memory was not enough{within}.", hint=hint)


def _patiently(write: Callable[[], JobState]) -> JobState:
    """Write down an end. Where the disk is full, somebody may make room: hours of work wait for that some minutes."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return write()
        except (NoSpace, Overloaded) as error:
            if time.monotonic() > end:
                raise
            log.warning("the job's end could not be written down, which is tried again: %s", error)
            time.sleep(5)


def _step_back() -> None:
    """Leave processor and disk to others: Linux derives the priority on the disk from this one."""
    os.nice(NICE)
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):  # a container may not allow it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _bound_memory(megabytes: int) -> None:
    """Hold the process to so much memory of its own. Files that are mapped and not written, such as weights, do not count."""
    import resource

    if megabytes:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        bound = megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (bound if most == resource.RLIM_INFINITY else min(bound, most), most))


def _lift_memory() -> None:
    """Give the last words room: the memory may be full to the brim."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def main(root: str, job_id: str, descriptor: str) -> int:
    """Work on the job `job_id`, which the worker took.

    This process has the worker's lock too, so that no other worker begins while it goes on, even where its own was killed.
    """
    start_logging()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    WorkerLock(int(descriptor))
    settings = Settings.load(home=root)
    _step_back()
    _bound_memory(settings.training_memory_mb)
    with Home(settings.model_copy(update={"threads": training_threads(settings)})) as home:
        try:
            attempt(home, Jobs(home.registry).get(job_id))
        except KeyboardInterrupt:
            log.info("stopped; the job stays queued")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
