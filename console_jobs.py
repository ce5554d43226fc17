"""What the command line shows of jobs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Column, Table

from .console import out
from .console_decisions import PLAIN, one_line
from .training.jobs.curve import plot

if TYPE_CHECKING:
    from .schema import JobState
    from .training.jobs.losses import Loss

COLOURS = {"done": "green", "running": "cyan", "failed": "red", "refused": "yellow", "cancelled": "yellow"}
MINUTE, HOUR, DAY = 60, 3600, 86400
BAR = 10  # so that a row of the table fits on a narrow terminal


def job_to_dict(job: JobState) -> dict[str, Any]:
    """Everything about a job, JSON-ready."""
    return asdict(job)


def show_jobs(jobs: Sequence[JobState], *, works: bool, as_json: bool) -> None:
    """A table, newest first, or one JSON object a line; `works` says whether the worker runs."""
    if as_json:
        for job in jobs:
            sys.stdout.write(json.dumps(job_to_dict(job)) + "\n")
        return
    if not jobs:
        out.print("There are no jobs. `collegium train` makes one.")
        return
    columns = (
        Column(name, no_wrap=True) for name in ("id", "kind", "name", "state", "stage", "progress", "left", "age")
    )
    table = Table(*columns, **PLAIN)
    for job in jobs:
        state = f"[{COLOURS.get(job.state, 'default')}]{_state(job)}[/]"
        said = (job.id, _plain(job.kind), _plain(job.name), state, _plain(job.stage))
        table.add_row(*said, _bar(job), "" if job.eta is None else _span(job.eta), _age(job.created))
    out.print(table)
    if not works and any(not job.over for job in jobs):
        out.print("Nobody works on them now: `collegium jobs work` does, and so does the next job that is submitted.")


def show_job(job: JobState, losses: Sequence[Loss], *, works: bool, as_json: bool) -> None:
    """One job: where it stands, what went wrong, its report, its loss curve."""
    if as_json:
        body = job_to_dict(job) | {"losses": [asdict(loss) for loss in losses]}
        sys.stdout.write(json.dumps(body, indent=1) + "\n")
        return
    colour = COLOURS.get(job.state, "default")
    out.print(f"[bold]{job.id}[/] · {_plain(job.kind)} {_plain(job.name)} · [{colour}]{_state(job)}[/]")
    out.print(f"submitted {_when(job.created)}, begun {_when(job.started)}, ended {_when(job.ended)}")
    if job.state == "running":
        left = [] if job.eta is None else [f"{_span(job.eta)} left"]
        loss = [] if job.loss is None else [f"loss {job.loss:.3f}"]
        stage = f"{_plain(job.stage) or 'starting'} {_bar(job)}".rstrip()
        out.print(", ".join([stage, *left, *loss, f"process {job.worker}"]))
    if job.attempts > 1:
        out.print(f"{job.attempts} processes have begun on it")
    if not works and not job.over:
        out.print("Nobody works on it now: `collegium jobs work` does.")
    if job.error:
        out.print(f"[{colour}]{_plain(job.error)}[/]")
    if job.report:
        out.print()
        for line in _listed(job.report):
            out.print(escape(line))
    if picture := plot(losses):
        out.print()
        out.print(escape(picture))


def show_log(text: str) -> None:
    """A log, as it is but for what a terminal would obey."""
    kept = "".join(character for character in text if character.isprintable() or character in "\n\t")
    sys.stdout.write(kept if not kept or kept.endswith("\n") else kept + "\n")


def left_running(job: JobState) -> str:
    """What is said to somebody who stops watching."""
    again = f"`collegium jobs follow {job.id}` watches it again, `collegium jobs cancel {job.id}` stops it."
    return f"The job {job.id} ({one_line(job.name)}) goes on in the background. {again}"


def _state(job: JobState) -> str:
    return "cancelling" if job.cancel and not job.over else job.state


def _bar(job: JobState) -> str:
    """How far the stage is; of a job that is over, nothing is left to tell."""
    if job.state != "running":
        return ""
    if not job.of:
        return f"{job.step} done" if job.step else ""
    done = min(1.0, job.step / job.of)
    return f"{'█' * round(done * BAR):░<{BAR}} {done:4.0%}"


def _age(created: str) -> str:
    return _span((datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds())


def _span(seconds: float) -> str:
    for unit, name in ((DAY, "d"), (HOUR, "h"), (MINUTE, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def _when(moment: str | None) -> str:
    return moment[:19].replace("T", " ") if moment else "-"


def _listed(report: Any) -> list[str]:
    """A report as indented lines."""
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(report)), sort_keys=False, allow_unicode=True, width=110).splitlines()


def _plain(text: str) -> str:
    return escape(one_line(text))
