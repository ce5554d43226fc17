"""Training jobs over HTTP: submit, look at, cancel, take up again."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel

from ..errors import CollegiumError
from ..experts.home import Home
from ..schema import JobState, Standing
from ..settings import Settings
from ..training.jobs import worker
from ..training.jobs.curve import svg
from ..training.jobs.losses import read_losses
from ..training.jobs.store import Jobs, new_id
from .errors import ErrorBody
from .plans import JobRequest, stored_plan

CHECK = 30.0
"""Seconds between two looks at whether jobs wait and nobody works."""

log = logging.getLogger(__name__)
router = APIRouter(
    prefix="/v1/collegium/jobs",
    responses={status: {"model": ErrorBody} for status in (400, 404, 409, 413, 429, 500, 507)},
)


class Desk:
    """Where jobs are handed in: the home, opened when it is first needed, beside the one that answers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._home: Home | None = None
        self._closed = False

    def home(self) -> Home:
        """The home. Raises what opening it raises."""
        with self._lock:
            if self._home is None:
                self._home = Home(self._settings)
            return self._home

    def close(self) -> None:
        """Close the home; nothing begins after that."""
        with self._lock:
            self._closed = True
            if self._home is not None:
                self._home.close()

    async def keep_working(self) -> None:
        """See to it now and then that somebody works where jobs wait: what ran when the machine stopped goes on."""
        while True:
            await asyncio.to_thread(self._see_to_it)
            await asyncio.sleep(CHECK)

    def _see_to_it(self) -> None:
        try:
            home = self.home()
            with self._lock:
                if not self._closed and worker.ensure_worker(home):
                    log.info("jobs wait: a worker was started")
        except CollegiumError as error:  # whoever asks for a job is told, too
            log.warning("jobs are not looked after: %s", error)
        except Exception:  # the edge of the thread: the next look may go well
            log.exception("looking after the jobs failed")


def _desk_home(request: Request) -> Home:
    desk: Desk = request.app.state.desk
    return desk.home()


Opened = Annotated[Home, Depends(_desk_home)]


class JobBody(BaseModel):
    """A job. `step` of `of` steps of the `stage` are done, which still takes `eta` seconds; dates are ISO 8601 in UTC."""

    id: str
    object: Literal["collegium.job"] = "collegium.job"
    kind: str
    name: str
    state: Standing
    cancelling: bool
    stage: str
    step: int
    of: int
    loss: float | None
    eta: float | None
    error: str | None
    report: dict[str, Any]
    attempts: int
    created: str
    started: str | None
    ended: str | None


class JobList(BaseModel):
    """Jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobBody]


class LossBody(BaseModel):
    """The mean loss over the steps up to this one; null where it was no number."""

    stage: str
    step: int
    loss: float | None


class LossList(BaseModel):
    """The losses of a job, in order."""

    object: Literal["list"] = "list"
    data: list[LossBody]


@router.post("", status_code=202)
def submit(body: JobRequest, home: Opened) -> JobBody:
    """Queue a job. What this acknowledges is done, even if the server or the machine stops meanwhile."""
    from ..training.pipeline import check
    from ..training.plan import plan_from_dict

    job_id = new_id()
    with _dropped_on_error(worker.job_folder(home, job_id)) as folder:
        plan = stored_plan(body.plan, home.settings, folder)
        check(plan_from_dict(plan), home)
        # The row is what acknowledges; from then on the folder stays.
        Jobs(home.registry).add(body.kind, body.plan.name, plan, job_id=job_id)
    worker.ensure_worker(home)
    return _body(Jobs(home.registry).get(job_id))


@router.get("")
def list_jobs(home: Opened, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> JobList:
    """The newest jobs."""
    return JobList(data=[_body(job) for job in Jobs(home.registry).latest(limit)])


@router.get("/{job_id}")
def job(job_id: str, home: Opened) -> JobBody:
    """One job."""
    return _body(Jobs(home.registry).get(job_id))


@router.post("/{job_id}/cancel")
def cancel(job_id: str, home: Opened) -> JobBody:
    """Ask for the end of a job: at once where it waits, soon where it runs."""
    return _body(worker.cancel(home, job_id))


@router.post("/{job_id}/resume")
def resume(job_id: str, home: Opened) -> JobBody:
    """Queue a failed or cancelled job again; it goes on from its last finished stage."""
    return _body(worker.resume(home, job_id))


@router.get("/{job_id}/losses")
def losses(job_id: str, home: Opened) -> LossList:
    """The losses so far."""
    folder = worker.job_folder(home, Jobs(home.registry).get(job_id).id)
    return LossList(data=[LossBody(**asdict(one)) for one in read_losses(folder)])


@router.get("/{job_id}/loss.svg", response_class=Response, responses={200: {"content": {"image/svg+xml": {}}}})
def loss_curve(job_id: str, home: Opened) -> Response:
    """The losses as a picture."""
    found = Jobs(home.registry).get(job_id)
    picture = svg(read_losses(worker.job_folder(home, found.id)), f"{found.kind} {found.name}")
    return Response(picture, media_type="image/svg+xml", headers={"Cache-Control": "no-cache"})


@contextmanager
def _dropped_on_error(folder: Path) -> Iterator[Path]:
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _body(state: JobState) -> JobBody:
    known = {name: value for name, value in asdict(state).items() if name in JobBody.model_fields}
    return JobBody(**known, cancelling=state.cancel and not state.over)
