"""The queue of jobs in the registry's database. Each method is one transaction: what it returned is on the disk."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from ...errors import InvalidRequest, UnknownJob
from ...experts.database import translated, writing
from ...experts.registry import Registry
from ...experts.tables import jobs
from ...schema import JobState, Standing

ATTEMPTS = 3
"""Processes that may die on a job before it is given up."""
_UNFINISHED = ("queued", "running")
_ID = re.compile(r"[0-9a-f]{1,8}")
_LIST = "`collegium jobs list` shows the jobs."


def new_id() -> str:
    """A job's id, before the job is there: for what is written into its folder first."""
    return secrets.token_hex(4)


class Jobs:
    """The jobs of a home. Every method may raise NoSpace and Overloaded, as those of the registry."""

    def __init__(self, registry: Registry) -> None:
        self._engine = registry.engine

    def add(self, kind: str, name: str, plan: Mapping[str, Any], *, job_id: str | None = None) -> JobState:
        """A new job, last in the queue."""
        job_id = job_id or new_id()
        with translated(), writing(self._engine) as connection:
            empty: dict[str, Any] = {"stage": "", "step": 0, "steps": 0, "report": {}, "attempts": 0, "cancel": False}
            known = {"id": job_id, "kind": kind, "name": name, "plan": dict(plan), "created": _now()}
            connection.execute(insert(jobs).values(**known, **empty, state="queued", turn=_last_turn(connection)))
            return _get(connection, job_id)

    def get(self, job_id: str) -> JobState:
        """The job of this id. Raises UnknownJob."""
        with translated(), self._engine.connect() as connection:
            return _get(connection, job_id)

    def find(self, beginning: str) -> JobState:
        """The job whose id begins so. Raises UnknownJob where there is none, InvalidRequest where there are several."""
        with translated(), self._engine.connect() as connection:
            like = jobs.c.id.like(f"{beginning}%") if _ID.fullmatch(beginning) else jobs.c.id == beginning
            rows = connection.execute(select(jobs).where(like).order_by(jobs.c.turn)).all()
        exact = [row for row in rows if row.id == beginning] or rows
        if not exact:
            raise UnknownJob(f"No job has the id {beginning!r}.", hint=_LIST)
        if len(exact) > 1:
            raise InvalidRequest(f"{beginning} may be {', '.join(row.id for row in exact)}.", hint="Give more of it.")
        return _state(exact[0])

    def latest(self, count: int) -> list[JobState]:
        """The newest `count` jobs, newest first."""
        with translated(), self._engine.connect() as connection:
            return [_state(row) for row in connection.execute(select(jobs).order_by(jobs.c.turn.desc()).limit(count))]

    def waiting(self) -> bool:
        """Whether anything is queued, or was begun and is not over."""
        with translated(), self._engine.connect() as connection:
            return connection.scalar(select(func.count()).where(jobs.c.state.in_(_UNFINISHED))) != 0

    def take(self, worker: int) -> JobState | None:
        """Begin the next job in the queue for the process `worker`; None where nothing waits."""
        with translated(), writing(self._engine) as connection:
            queued = select(jobs.c.id).where(jobs.c.state == "queued").order_by(jobs.c.turn, jobs.c.id).limit(1)
            job_id = connection.scalar(queued)
            if job_id is None:
                return None
            begun = {"state": "running", "attempts": jobs.c.attempts + 1, "worker": worker, "started": _now()}
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(**begun, eta=None))
            return _get(connection, job_id)

    def works_on(self, job_id: str, worker: int) -> None:
        """Note which process works on a job that runs."""
        self._change(job_id, {"worker": worker}, only=("running",))

    def advance(self, job_id: str, stage: str, step: int, of: int, *, loss: float | None, eta: float | None) -> bool:
        """Note where a running job stands; returns whether it shall go on."""
        where = {"stage": stage, "step": step, "steps": of, "loss": _finite(loss), "eta": _finite(eta)}
        job = self._change(job_id, where, only=("running",))
        return job.state == "running" and not job.cancel

    def wanted(self, job_id: str) -> bool:
        """Whether a running job shall go on."""
        job = self.get(job_id)
        return job.state == "running" and not job.cancel

    def end(
        self, job_id: str, state: Standing, *, error: str | None = None, report: Mapping[str, Any] | None = None
    ) -> JobState:
        """Close a job that runs."""
        said = error and error.encode("utf-8", "replace").decode()  # it may quote a lone surrogate
        changes = {"state": state, "error": said, "report": _finite(dict(report or {}))}
        return self._change(job_id, changes | _closed(), only=("running",))

    def put_back(self, job_id: str) -> JobState:
        """Back to its place in the queue, for a process that was told to stop: that is no failed attempt."""
        changes = {"state": "queued", "worker": None, "eta": None, "attempts": jobs.c.attempts - 1}
        return self._change(job_id, changes, only=("running",))

    def cancel(self, job_id: str) -> JobState:
        """Ask for the end of a job: at once where it waits, soon where it runs. Raises InvalidRequest where it is over."""
        with translated(), writing(self._engine) as connection:
            job = _get(connection, job_id)
            if job.over:
                raise InvalidRequest(f"The job {job_id} is {job.state}, there is nothing to cancel.")
            ended = {"state": "cancelled"} | _closed() if job.state == "queued" else {}
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(cancel=True, **ended))
            return _get(connection, job_id)

    def resume(self, job_id: str) -> JobState:
        """Queue a failed or cancelled job again, last. Raises InvalidRequest for others."""
        with translated(), writing(self._engine) as connection:
            job = _get(connection, job_id)
            if job.state not in ("failed", "cancelled"):
                what = "Only failed and cancelled jobs are taken up again."
                raise InvalidRequest(f"The job {job_id} is {job.state}.", hint=what)
            fresh = {"state": "queued", "attempts": 0, "cancel": False, "error": None, "ended": None, "eta": None}
            query = update(jobs).where(jobs.c.id == job_id).values(**fresh, turn=_last_turn(connection))
            connection.execute(query)
            return _get(connection, job_id)

    def recover(self) -> list[JobState]:
        """Decide on jobs that run without a process; only the holder of the worker's lock knows that there is none.

        They go back to their place in the queue, unless they were cancelled or too many processes have died on them.
        """
        with translated(), writing(self._engine) as connection:
            left = [_state(row) for row in connection.execute(select(jobs).where(jobs.c.state == "running"))]
            for job in left:
                connection.execute(update(jobs).where(jobs.c.id == job.id).values(**_after_death(job)))
            return [_get(connection, job.id) for job in left]

    def _change(self, job_id: str, changes: Mapping[str, Any], *, only: tuple[str, ...]) -> JobState:
        with translated(), writing(self._engine) as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id, jobs.c.state.in_(only)).values(**changes))
            return _get(connection, job_id)


def _after_death(job: JobState) -> dict[str, Any]:
    if job.cancel:
        return {"state": "cancelled"} | _closed()
    if job.attempts >= ATTEMPTS:
        error = (
            f"Its process was killed {job.attempts} times; the system may have run out of memory. "
            f"`collegium jobs log {job.id}` has its last words, `collegium jobs resume {job.id}` tries again."
        )
        return {"state": "failed", "error": error} | _closed()
    return {"state": "queued", "worker": None, "eta": None}


def _closed() -> dict[str, Any]:
    return {"ended": _now(), "worker": None, "eta": None}


def _last_turn(connection: Connection) -> int:
    return int(connection.scalar(select(func.coalesce(func.max(jobs.c.turn), 0))) or 0) + 1


def _get(connection: Connection, job_id: str) -> JobState:
    row = connection.execute(select(jobs).where(jobs.c.id == job_id)).one_or_none()
    if row is None:
        raise UnknownJob(f"No job has the id {job_id!r}.", hint=_LIST)
    return _state(row)


def _state(row: Row[Any]) -> JobState:
    values = dict(row._mapping)
    values["of"] = values.pop("steps")
    del values["turn"]
    return JobState(**values)


def _finite(value: Any) -> Any:
    """The value without what JSON cannot say: numbers that are none, or have no end."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
