"""Kinds of work for tests of jobs, as a plug-in that real worker processes find, and homes to run them in."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from collegium.experts.home import Home
from collegium.experts.registry import Registry
from collegium.schema import JobState
from collegium.settings import Settings
from collegium.training.jobs.store import Jobs
from collegium.training.jobs.worker import job_folder, works

KINDS = textwrap.dedent('''
    import errno, json, os, signal, time
    from collegium.errors import GateRefused
    from collegium.training.stages import Stages

    def steps(plan, home, watch, *, folder):
        """A stage that ends at once and one of some steps; `notes` tells which processes ran what."""
        def note(what):
            with (folder / "notes").open("a") as file:
                file.write(f"{what} {os.getpid()} {os.getppid()} {time.time()}\\n")
        def prepare(part):
            note("prepare")
            watch.progress("prepare", 1, 1)
        def train(part):
            note("train")
            attempt = (folder / "notes").read_text().count("train ")
            for step in range(1, plan.get("steps", 3) + 1):
                watch.progress("train", step, plan.get("steps", 3))
                watch.loss(step, 4 / step + attempt)
                if step == plan.get("dies_at") and attempt <= plan.get("deaths", 1):
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(plan.get("pause", 0))
            note("end")
        stages = Stages(folder)
        stages.run("prepare", prepare)
        stages.run("train", train)
        return {"nice": os.nice(0), "threads": os.environ["OMP_NUM_THREADS"], "set": home.settings.threads}

    def deaf(plan, home, watch, *, folder):
        watch.progress("sleeping", 0, 0)
        time.sleep(60)

    def refused(plan, home, watch, *, folder):
        raise GateRefused("It is not better.", hint="Add examples.", report={"by": -0.2, "odd": float("nan")})

    def full(plan, home, watch, *, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    def greedy(plan, home, watch, *, folder):
        kept = []
        while len(kept) < 40:
            kept.append(bytearray(plan["bytes"]))
        return {}

    def torch(plan, home, watch, *, folder):
        try:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        except RuntimeError as error:
            raise ValueError("training broke off") from error

    def odd(plan, home, watch, *, folder):
        raise LookupError("nobody expected this \\ud800")
''')
ENTRY_POINTS = "[collegium.jobs]\n" + "".join(
    f"{kind} = collegium_job_kinds:{kind}\n" for kind in ("steps", "deaf", "refused", "full", "greedy", "torch", "odd")
)


def install_kinds(folder: Path) -> None:
    """Put the plug-in where `folder` is on the path: PYTHONPATH, for other processes."""
    about = folder / "collegium_job_kinds-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "collegium_job_kinds.py").write_text(KINDS, "utf-8")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: collegium-job-kinds\nVersion: 1.0\n", "utf-8")
    (about / "entry_points.txt").write_text(ENTRY_POINTS, "utf-8")


PRISTINE: list[Path] = []
"""A database that was made once, with a release, so that no process seeds it."""


def _pristine(folder: Path) -> Path:
    """Make the database in `folder`, and a copy of it elsewhere."""
    registry = Registry.open(f"sqlite:///{folder / 'collegium.sqlite'}")
    registry.publish(router="none", note="")
    registry.close()  # which leaves one file, without a journal
    aside = folder.parent / "pristine"
    aside.mkdir()
    return Path(shutil.copy(folder / "collegium.sqlite", aside))


@contextlib.contextmanager
def bare_home(folder: Path, **settings: Any) -> Iterator[Home]:
    """A home with nothing in it, for work that needs no model; at the end no process of it is left."""
    folder.mkdir(parents=True)
    (folder / "collegium.toml").write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    if PRISTINE:
        shutil.copy(PRISTINE[0], folder)
    else:
        PRISTINE.append(_pristine(folder))
    with Home(Settings.load({}, home=folder)) as home:
        try:
            yield home
        finally:
            end_work(home)


def end_work(home: Home) -> None:
    """Kill what works in the home, and wait until nothing does."""
    for line in all_notes(home):
        for process in map(int, line.split()[1:3]):
            with contextlib.suppress(ProcessLookupError):
                if works(home) and process not in (1, os.getpid()):
                    os.kill(process, signal.SIGKILL)
    until(lambda: not works(home))


def all_notes(home: Home) -> list[str]:
    return [line for path in (home.root / "jobs").glob("*/notes") for line in path.read_text().splitlines()]


def notes(home: Home, job: JobState) -> list[list[str]]:
    """What the work `steps` ran of a job: what, process, parent, when."""
    path = job_folder(home, job.id) / "notes"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def until(condition: Callable[[], bool], seconds: float = 90) -> None:
    """Wait for something that happens soon."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def ended(home: Home, job: JobState) -> JobState:
    """The job when it is over."""
    until(lambda: Jobs(home.registry).get(job.id).over)
    return Jobs(home.registry).get(job.id)
