"""Jobs in real processes: killed, cancelled, bounded, one after the other."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from collegium.errors import CollegiumError
from collegium.experts.home import Home
from collegium.schema import JobState
from collegium.tests.job_doubles import bare_home, ended, install_kinds, notes, until
from collegium.training.jobs import follow as following
from collegium.training.jobs import worker
from collegium.training.jobs.attempt import attempt
from collegium.training.jobs.follow import follow
from collegium.training.jobs.losses import read_losses
from collegium.training.jobs.store import Jobs
from collegium.training.jobs.worker import cancel, job_folder, resume, submit, works

SUBMITTER = """
import sys
from collegium.experts.home import Home
from collegium.settings import Settings
from collegium.training.jobs.worker import submit
with Home(Settings.load({}, home=sys.argv[1])) as home:
    print("ready", flush=True)
    sys.stdin.readline()
    print(submit(home, "steps", sys.argv[2], {"steps": 2, "pause": 0.1}).id)
"""


@pytest.fixture(autouse=True)
def _kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_kinds(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with bare_home(tmp_path / "home", training_threads=1) as opened:
        yield opened


def processes(home: Home, job: JobState) -> set[int]:
    """The attempts at a job and their workers."""
    return {int(process) for note in notes(home, job) for process in note[1:3]}


def in_its_steps(home: Home, job: JobState) -> None:
    until(lambda: any(note[0] == "train" for note in notes(home, job)))


def test_a_job_is_done_in_the_background_behind_others(home: Home) -> None:
    job = Jobs(home.registry).add("steps", "law", {"steps": 3})
    assert not works(home), "whoever submitted it died before it could start a worker; who follows does"
    seen: list[tuple[str, int, int]] = []
    done = follow(home, job.id, lambda *step: seen.append(step))
    assert (done.state, done.error, done.attempts) == ("done", None, 1)
    assert done.report == {"nice": min(19, os.nice(0) + 10), "threads": "1", "set": 1}
    assert [loss.step for loss in read_losses(job_folder(home, job.id))] == [1, 2, 3]
    assert (done.stage, done.step, done.of) == ("train", 3, 3)
    assert os.getpid() not in processes(home, job)
    until(lambda: not works(home))
    assert not worker.ensure_worker(home), "nothing waits"


def test_two_processes_submit_at_once_and_one_worker_does_one_after_the_other(home: Home) -> None:
    command = [sys.executable, "-c", SUBMITTER, str(home.root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, name], **pipes) for name in ("law", "tax")]  # type: ignore[call-overload]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    ids = [process.communicate("go\n", timeout=60)[0].strip() for process in both]
    jobs = [ended(home, Jobs(home.registry).get(one)) for one in ids]
    assert [job.state for job in jobs] == ["done", "done"]
    first, second = sorted(([float(note[3]) for note in notes(home, job)] for job in jobs), key=min)
    assert max(first) <= min(second)
    assert len({note[2] for job in jobs for note in notes(home, job)}) == 1


def test_a_job_that_is_killed_is_taken_up_at_its_last_stage_some_times(home: Home) -> None:
    job = submit(home, "steps", "law", {"steps": 4, "dies_at": 3, "deaths": 3})
    failed = ended(home, job)
    assert (failed.state, failed.attempts) == ("failed", 3)
    assert "killed 3 times" in str(failed.error)
    resume(home, job.id)
    done = ended(home, job)
    assert (done.state, done.attempts) == ("done", 1)
    assert [note[0] for note in notes(home, job)] == ["prepare", *["train"] * 4, "end"]
    losses = [(loss.step, loss.loss) for loss in read_losses(job_folder(home, job.id))]
    assert losses == [(step, 4 / step + 4) for step in (1, 2, 3, 4)], "those of the last attempt"


def test_a_power_failure_in_mid_job_is_followed_by_another_worker(home: Home) -> None:
    job = submit(home, "steps", "law", {"steps": 100, "pause": 0.1, "deaths": 0})
    in_its_steps(home, job)
    attempt, parent = (int(one) for one in notes(home, job)[-1][1:3])
    os.kill(parent, signal.SIGKILL)
    assert works(home), "the attempt goes on, and no second one begins beside it"
    assert not worker.ensure_worker(home)
    os.kill(attempt, signal.SIGKILL)
    until(lambda: not works(home))
    assert Jobs(home.registry).get(job.id).state == "running", "nobody was left to say anything else"
    assert worker.ensure_worker(home)
    until(lambda: len([note for note in notes(home, job) if note[0] == "train"]) == 2)
    again = Jobs(home.registry).get(job.id)
    assert (again.state, again.attempts) == ("running", 2)
    assert [note[0] for note in notes(home, job)] == ["prepare", "train", "train"]
    cancel(home, job.id)
    assert ended(home, job).state == "cancelled"


def test_workers_that_cannot_begin_are_named_to_who_follows(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "EVERY", 0.05)
    waiting = Jobs(home.registry).add("steps", "law", {})
    (home.root / "collegium.toml").write_text("training_threads = 'many'\n")
    with pytest.raises(CollegiumError, match=rf"Nobody works on the job {waiting.id}.*collegium jobs log"):
        follow(home, waiting.id, lambda *step: None)
    assert "training_threads" in worker.worker_log(home).read_text()


def test_a_running_job_is_cancelled_and_the_next_one_begins(home: Home) -> None:
    job = submit(home, "steps", "law", {"steps": 1000, "pause": 0.1})
    in_its_steps(home, job)
    after = submit(home, "steps", "tax", {})
    assert cancel(home, job.id).state == "running"
    cancelled = ended(home, job)
    assert (cancelled.state, cancelled.error) == ("cancelled", f"The job {job.id} was cancelled.")
    assert notes(home, job)[-1][0] == "train"
    assert ended(home, after).state == "done"


def test_work_that_does_not_hear_of_it_is_killed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GRACE", 0.1)
    job = Jobs(home.registry).add("deaf", "law", {})
    monkeypatch.setattr(worker, "POLL", 0.05)
    wanted = Jobs.wanted

    def cancelled_meanwhile(jobs: Jobs, job_id: str) -> bool:
        if jobs.get(job_id).stage == "sleeping" and wanted(jobs, job_id):
            jobs.cancel(job_id)
        return wanted(jobs, job_id)

    monkeypatch.setattr(Jobs, "wanted", cancelled_meanwhile)
    lock = worker.take_lock(home)
    assert lock
    worker.work(home, lock)
    assert Jobs(home.registry).get(job.id).state == "cancelled"
    assert not works(home)


def test_a_worker_that_is_told_to_stop_puts_its_job_back(home: Home) -> None:
    job = submit(home, "steps", "law", {"steps": 100, "pause": 0.1})
    in_its_steps(home, job)
    os.kill(int(notes(home, job)[-1][2]), signal.SIGTERM)
    until(lambda: not works(home))
    waiting = Jobs(home.registry).get(job.id)
    assert (waiting.state, waiting.attempts) == ("queued", 0)
    cancel(home, job.id)


def test_memory_beyond_the_bound_is_a_sentence(tmp_path: Path) -> None:
    with bare_home(tmp_path / "bounded", training_memory_mb=600) as home:
        job = submit(home, "greedy", "law", {"bytes": 50 * 2**20})
        failed = ended(home, job)
        until(lambda: not works(home))
        assert failed.state == "failed"
        assert "within the 600 MB of training_memory_mb. Raise that setting" in str(failed.error)
        assert "MemoryError" in worker.job_log(home, job.id).read_text()
        assert f"job {job.id}: failed: The memory was not enough" in worker.worker_log(home).read_text()


@pytest.mark.parametrize(
    ("kind", "state", "said"),
    [
        ("refused", "refused", "It is not better. Add examples."),
        ("full", "failed", "The disk that holds .* is full. Free some space"),
        ("torch", "failed", "The memory was not enough. Close other programs"),
        ("odd", "failed", "It failed unexpectedly: LookupError: nobody expected this [?]..*collegium jobs log"),
        ("unheard-of", "failed", "There is no job of the kind 'unheard-of'. Known: .*train"),
    ],
)
def test_every_other_end_has_its_sentence(
    home: Home, kind: str, state: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "collegium_job_kinds", raising=False)
    Jobs(home.registry).add(kind, "law", {})
    job = Jobs(home.registry).take(os.getpid())
    assert job
    over = attempt(home, job)
    assert over == Jobs(home.registry).get(job.id)
    assert over.state == state
    assert re.match(said, str(over.error))
    assert over.report == ({"by": -0.2, "odd": None} if kind == "refused" else {})
