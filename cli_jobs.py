"""The commands about jobs: `collegium jobs ...`, and watching one that was just submitted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_shared import AsJson, open_home, reporting

if TYPE_CHECKING:
    from .experts.home import Home
    from .schema import JobState

jobs = typer.Typer(help="List, watch, stop and take up training jobs.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="The job's id, or its beginning.")]


@jobs.command("list")
def list_jobs(
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many, at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """The jobs, newest first. With --json, one JSON object a line."""
    from .console_jobs import show_jobs
    from .training.jobs.store import Jobs
    from .training.jobs.worker import works

    with open_home() as home:
        show_jobs(Jobs(home.registry).latest(count), works=works(home), as_json=as_json)


@jobs.command("show")
def show(
    job: Id,
    svg: Annotated[Path | None, typer.Option(help="File to draw the loss curve into.")] = None,
    as_json: AsJson = False,
) -> None:
    """One job: where it stands, its report, its loss curve."""
    from .console_jobs import show_job
    from .training.jobs.curve import svg as drawn
    from .training.jobs.losses import read_losses
    from .training.jobs.store import Jobs
    from .training.jobs.worker import job_folder, works

    with open_home() as home:
        found = Jobs(home.registry).find(job)
        losses = read_losses(job_folder(home, found.id))
        show_job(found, losses, works=works(home), as_json=as_json)
    if svg:
        _write(svg, drawn(losses, f"{found.kind} {found.name}"))


@jobs.command("follow")
def follow_job(job: Id) -> None:
    """Watch a job until it is over; Ctrl-C stops watching, not the job."""
    from .training.jobs.store import Jobs

    with open_home() as home:
        ended = watch_job(home, Jobs(home.registry).find(job))
    typer.echo(f"{ended.id} is {ended.state}.")
    finish(ended)


@jobs.command("cancel")
def cancel_job(job: Id) -> None:
    """Stop a job. What it has finished is kept: `jobs resume` goes on from there."""
    from .training.jobs.store import Jobs
    from .training.jobs.worker import cancel

    with open_home() as home:
        asked = cancel(home, Jobs(home.registry).find(job).id)
    typer.echo(f"{asked.id} is cancelled." if asked.over else f"{asked.id} will stop in a moment.")


@jobs.command("resume")
def resume_job(job: Id) -> None:
    """Queue a failed or cancelled job again; it goes on from the last stage that it finished."""
    from .training.jobs.store import Jobs
    from .training.jobs.worker import resume

    with open_home() as home:
        queued = resume(home, Jobs(home.registry).find(job).id)
    typer.echo(f"{queued.id} is queued. `collegium jobs follow {queued.id}` watches it.")


@jobs.command("log")
def show_job_log(
    job: Annotated[str | None, typer.Argument(metavar="ID", help="A job's id; without it, the worker's log.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 100,
) -> None:
    """What a job's processes wrote, or the worker."""
    from .console_jobs import show_log
    from .training.jobs.store import Jobs
    from .training.jobs.worker import job_log, worker_log

    with open_home() as home:
        path = worker_log(home) if job is None else job_log(home, Jobs(home.registry).find(job).id)
    try:
        text = path.read_text("utf-8", "replace")
    except FileNotFoundError:
        typer.echo("Nothing has been written yet.", err=True)
        return
    show_log("".join(text.splitlines(keepends=True)[-lines:]))


@jobs.command("work")
def work_here() -> None:
    """Run what is queued, here and now, until nothing is. Otherwise a process in the background does."""
    from .training.jobs.worker import start_logging, take_lock, work

    start_logging()
    with open_home() as home:
        lock = take_lock(home)
        if lock is None:
            typer.echo("A worker runs already. `collegium jobs list` shows what it does.")
            return
        work(home, lock)
    typer.echo("No job is left.")


def watch_job(home: Home, job: JobState) -> JobState:
    """Show how a job goes until it is over, and return it. Ctrl-C ends the command, and the job goes on."""
    from .console_jobs import left_running
    from .training.jobs.follow import follow

    try:
        with reporting() as progress:
            return follow(home, job.id, progress)
    except KeyboardInterrupt:
        typer.echo(left_running(job), err=True)
        raise typer.Exit(130) from None


def finish(job: JobState) -> None:
    """End the command as the job ended. Raises GateRefused for a refused job, CollegiumError for one that failed."""
    from .errors import Cancelled, CollegiumError, GateRefused

    kinds = {"refused": GateRefused, "cancelled": Cancelled, "failed": CollegiumError}
    if job.state in kinds:
        raise kinds[job.state](job.error or f"The job {job.id} is {job.state}.")


def _write(path: Path, text: str) -> None:
    from .errors import InvalidRequest

    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}.") from None
    typer.echo(f"Wrote {path}.", err=True)
