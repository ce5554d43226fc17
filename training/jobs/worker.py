"""The worker of a home: one process that runs the jobs of the queue, one after the other, and ends when none is left.

Each attempt at a job is a process of its own (`attempt.py`), so that its memory goes with it and its death is noticed at once.
Whoever submits a job starts the worker where there is none; it is detached, so it outlives whoever started it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ...errors import SettingsError
from ...experts.home import Home
from ...models.load import cores
from ...schema import JobState
from ...settings import Settings
from .lock import WorkerLock, is_held
from .store import Jobs

GRACE = 20.0
"""Seconds that the work may take to notice that it was cancelled; then its process is killed."""
POLL = 0.5
"""Seconds between two looks at whether the job that runs was cancelled."""
LOG_BYTES = 2**20
"""A log that is longer is put aside before a worker begins; the one before that is dropped."""

log = logging.getLogger(f"{__package__}.worker")  # run as a program, its name is another


def job_folder(home: Home, job_id: str) -> Path:
    """Where a job keeps what is its own: its stages, its losses, its log, what it was given."""
    return home.root / "jobs" / job_id


def worker_log(home: Home) -> Path:
    """What the worker wrote."""
    return home.root / "jobs" / "worker.log"


def job_log(home: Home, job_id: str) -> Path:
    """What the processes that worked on a job wrote."""
    return job_folder(home, job_id) / "job.log"


def submit(home: Home, kind: str, name: str, plan: Mapping[str, Any], *, job_id: str | None = None) -> JobState:
    """Queue a job and see to it that somebody works. When this returns, the job survives whatever happens.

    `kind` is one of `attempt.WORK`, `name` the expert's; `plan` is JSON-ready. `job_id` is that of `store.new_id`.
    """
    job = Jobs(home.registry).add(kind, name, plan, job_id=job_id)
    ensure_worker(home)
    return job


def cancel(home: Home, job_id: str) -> JobState:
    """Ask for the end of a job. Raises UnknownJob, and InvalidRequest where it is over."""
    job = Jobs(home.registry).cancel(job_id)
    ensure_worker(home)  # where the one that ran it has died, the next one closes it
    return job


def resume(home: Home, job_id: str) -> JobState:
    """Queue a failed or cancelled job again; it goes on from its last finished stage. Raises UnknownJob, InvalidRequest."""
    job = Jobs(home.registry).resume(job_id)
    ensure_worker(home)
    return job


def works(home: Home) -> bool:
    """Whether the home's worker runs."""
    return is_held(_lock(home))


def ensure_worker(home: Home) -> bool:
    """Start a worker where jobs wait and none runs; returns whether one was started.

    It reads its settings from the file and the environment, like every other command. Raises SettingsError where the log cannot
    be written.
    """
    if not Jobs(home.registry).waiting():
        return False
    lock = WorkerLock.take(_lock(home))
    if lock is None:  # it looks at the queue once more after it has let go of its lock
        return False
    try:
        with _opened(worker_log(home)) as output:
            arguments = ("worker", home.root, lock.descriptor)
            process = _start(*arguments, lock=lock, output=output, start_new_session=True)
    finally:
        lock.leave()
    # A server lives longer than its workers, and somebody has to take note of their end.
    threading.Thread(target=process.wait, name="worker-end", daemon=True).start()
    return True


def take_lock(home: Home) -> WorkerLock | None:
    """The right to work on the home's jobs, or None where another process has it."""
    return WorkerLock.take(_lock(home))


def work(home: Home, lock: WorkerLock) -> None:
    """Run what is queued until nothing is; lets go of the lock."""
    jobs = Jobs(home.registry)
    held: WorkerLock | None = lock
    while held is not None:
        for left in jobs.recover():
            log.warning("job %s: its process has died; now it is %s", left.id, left.state)
        job = jobs.take(os.getpid())
        if job is not None:
            _attempt(home, jobs, job, held)
            continue
        held.release()
        # What was submitted while the lock was held was left to this worker.
        held = take_lock(home) if jobs.waiting() else None


def _attempt(home: Home, jobs: Jobs, job: JobState, lock: WorkerLock) -> None:
    log.info("job %s: %s %s, attempt %d", job.id, job.kind, job.name, job.attempts)
    with _opened(job_log(home, job.id)) as output:
        environ = _limits(home.settings)
        process = _start(
            "attempt", home.root, job.id, lock.descriptor, lock=lock, output=output, env={**os.environ, **environ}
        )
        try:
            jobs.works_on(job.id, process.pid)
            _wait(jobs, job.id, process)
        except BaseException:
            _stop(process)  # it puts the job back
            raise
    state = jobs.get(job.id)
    if state.over:
        log.info("job %s: %s%s", job.id, state.state, f": {state.error}" if state.error else "")
    else:
        log.warning("job %s: its process ended with the status %s", job.id, process.returncode)


def _wait(jobs: Jobs, job_id: str, process: subprocess.Popen[bytes]) -> None:
    cancelled_at: float | None = None
    while True:
        try:
            process.wait(POLL)
            return
        except subprocess.TimeoutExpired:
            if jobs.wanted(job_id):
                continue
        cancelled_at = cancelled_at or time.monotonic()
        if time.monotonic() - cancelled_at > GRACE:
            log.warning("job %s: it does not notice that it was cancelled, its process is killed", job_id)
            process.kill()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _limits(settings: Settings) -> dict[str, str]:
    """The environment of an attempt. What counts threads reads it when it is loaded, which is before any code of ours."""
    threads = str(training_threads(settings))
    return {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads, "TQDM_DISABLE": "1"}


def training_threads(settings: Settings) -> int:
    """How many threads a job takes."""
    return settings.training_threads or max(1, cores() // 2)


def _start(
    module: str, *arguments: object, lock: WorkerLock, output: IO[bytes], **options: Any
) -> subprocess.Popen[bytes]:
    # -P: a user's folder may hold a file that is named like a module.
    command = [sys.executable, "-P", "-m", f"{__package__}.{module}", *map(str, arguments)]
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
    return subprocess.Popen(command, pass_fds=(lock.descriptor,), **streams, **options)  # noqa: S603


def _opened(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.replace(path.with_suffix(".old.log"))
        return path.open("ab")
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}.", hint="Check home and its disk.") from None


def _lock(home: Home) -> Path:
    return home.root / "jobs" / "worker.lock"


def start_logging() -> None:
    """Write what this process does to standard error, which is a log."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger(__package__).setLevel(logging.INFO)


def main(root: str, descriptor: str) -> None:
    """The detached worker, which was handed the lock."""
    start_logging()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    lock = WorkerLock(int(descriptor))
    with Home(Settings.load(home=root)) as home:
        try:
            work(home, lock)
        except KeyboardInterrupt:
            log.info("stopped; what is queued stays queued")


if __name__ == "__main__":
    main(*sys.argv[1:])
