"""`collegium jobs` as a user meets it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import typer
from typer.testing import CliRunner

from collegium import cli_jobs
from collegium.cli_shared import given
from collegium.errors import CollegiumError, GateRefused
from collegium.experts.home import Home
from collegium.schema import JobState
from collegium.tests.job_doubles import bare_home, install_kinds
from collegium.training.jobs import worker
from collegium.training.jobs.losses import Loss, append_loss
from collegium.training.jobs.store import Jobs


@dataclass(frozen=True)
class Run:
    """Runs `collegium jobs ...` in this process."""

    home: Home

    def __call__(self, *arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(cli_jobs.jobs, arguments)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result.output


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.setitem(given, "home", tmp_path / "home")
    monkeypatch.setitem(given, "quiet", True)
    monkeypatch.setattr(worker, "ensure_worker", lambda home: False)  # nothing runs unless a test says so
    with bare_home(tmp_path / "home") as opened:
        yield opened


@pytest.fixture
def run(home: Home) -> Run:
    return Run(home)


@pytest.fixture
def jobs(home: Home) -> Jobs:
    return Jobs(home.registry)


def running(home: Home) -> JobState:
    jobs = Jobs(home.registry)
    jobs.add("train", "law", {})
    job = jobs.take(4711)
    assert job
    jobs.advance(job.id, "train", 40, 100, loss=1.234, eta=7200.0)
    worker.job_folder(home, job.id).mkdir(parents=True)
    for step in range(10, 50, 10):
        append_loss(worker.job_folder(home, job.id), Loss("train", step, 30 / step))
    return jobs.get(job.id)


def test_without_jobs_there_is_a_sentence(run: Run) -> None:
    assert run("list") == "There are no jobs. `collegium train` makes one.\n"


def test_the_list_says_where_each_job_stands(run: Run, home: Home, jobs: Jobs) -> None:
    job = running(home)
    waiting = jobs.add("proxy", "tax", {})
    head, second, first, note = run("list").splitlines()
    assert head.split() == ["id", "kind", "name", "state", "stage", "progress", "left", "age"]
    assert second.split()[:4] == [waiting.id, "proxy", "tax", "queued"]
    assert re.match(rf"{job.id} +train +law +running +train +█{{4}}░{{6}}  40% +2 h +\d s", first)
    assert "collegium jobs work" in note
    rows = [json.loads(line) for line in run("list", "--json").splitlines()]
    assert [row["id"] for row in rows] == [waiting.id, job.id]
    assert (rows[1]["step"], rows[1]["of"], rows[1]["eta"]) == (40, 100, 7200.0)
    assert len(run("list", "-n", "1", "--json").splitlines()) == 1


def test_one_job_is_shown_with_its_curve(run: Run, home: Home, jobs: Jobs, tmp_path: Path) -> None:
    job = running(home)
    shown = run("show", job.id[:6])
    assert f"{job.id} · train law · running" in shown
    assert "train ████░░░░░░  40%, 2 h left, loss 1.234, process 4711\n" in shown
    assert "loss by step, train" in shown
    jobs.end(job.id, "refused", error="law is not better. Add [b]examples[/b].", report={"score": {"law": 0.25}})
    shown = run("show", job.id, "--svg", str(tmp_path / "loss.svg"))
    assert "· refused\n" in shown
    assert "law is not better. Add [b]examples[/b]." in shown
    assert "score:\n  law: 0.25\n" in shown
    assert ET.parse(tmp_path / "loss.svg").getroot().tag.endswith("svg")
    body = json.loads(run("show", job.id, "--json"))
    assert (body["state"], body["report"], len(body["losses"])) == ("refused", {"score": {"law": 0.25}}, 4)
    with pytest.raises(CollegiumError, match="cannot be written"):
        run("show", job.id, "--svg", str(tmp_path / "nowhere" / "loss.svg"))


def test_jobs_are_cancelled_and_taken_up(run: Run, home: Home, jobs: Jobs) -> None:
    job = running(home)
    waiting = jobs.add("train", "tax", {})
    assert run("cancel", waiting.id) == f"{waiting.id} is cancelled.\n"
    assert run("cancel", job.id) == f"{job.id} will stop in a moment.\n"
    assert "cancelling" in run("list")
    assert run("resume", waiting.id).startswith(f"{waiting.id} is queued.")
    with pytest.raises(CollegiumError, match="No job has the id"):
        run("cancel", "ffffffff0")


def test_a_log_does_not_command_the_terminal(run: Run, home: Home) -> None:
    assert "Nothing has been written yet." in run("log")
    job = running(home)
    worker.job_log(home, job.id).write_text("one\n\x1b[2Jtwo\nthree")
    assert run("log", job.id, "-n", "2") == "[2Jtwo\nthree\n"


def test_who_stops_watching_is_told_how_to_go_on(run: Run, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> JobState:
        raise KeyboardInterrupt

    job = running(home)
    monkeypatch.setattr("collegium.training.jobs.follow.follow", interrupted)
    said = run("follow", job.id, status=130)
    assert f"The job {job.id} (law) goes on in the background." in said
    assert f"`collegium jobs follow {job.id}`" in said
    assert f"`collegium jobs cancel {job.id}`" in said


def test_a_followed_job_ends_the_command_as_it_ended(run: Run, home: Home, jobs: Jobs) -> None:
    job = running(home)
    jobs.end(job.id, "refused", error="law is not better.")
    with pytest.raises(GateRefused, match=r"^law is not better\.$"):
        run("follow", job.id)
    done = jobs.add("train", "tax", {})
    jobs.take(1)
    jobs.end(done.id, "done")
    assert run("follow", done.id) == f"{done.id} is done.\n"


def test_work_is_done_here_where_nobody_else_does_it(
    run: Run, home: Home, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_kinds(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    job = jobs.add("steps", "law", {})
    lock = worker.take_lock(home)
    assert lock
    assert "A worker runs already" in run("work")
    lock.release()
    assert run("work").endswith("No job is left.\n")
    assert jobs.get(job.id).state == "done"


def test_the_commands_are_those_of_the_page() -> None:
    commands = typer.main.get_command(cli_jobs.jobs)
    assert set(getattr(commands, "commands")) == {"list", "show", "follow", "cancel", "resume", "log", "work"}  # noqa: B009
