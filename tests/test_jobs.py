"""The queue of jobs, what is noted of one that runs, and its losses, within one process."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import Cancelled, InvalidRequest, NoSpace, UnknownJob
from collegium.experts import tables
from collegium.experts.registry import Registry
from collegium.schema import JobState
from collegium.training.jobs.losses import FILE, Loss, append_loss, read_losses
from collegium.training.jobs.monitor import Monitor
from collegium.training.jobs.store import ATTEMPTS, Jobs


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    opened = Registry.open(f"sqlite:///{tmp_path}/registry.db")
    yield opened
    opened.close()


@pytest.fixture
def jobs(registry: Registry) -> Jobs:
    return Jobs(registry)


def running(jobs: Jobs) -> JobState:
    jobs.add("train", "law", {})
    job = jobs.take(1)
    assert job
    return job


def test_what_was_submitted_is_read_back(jobs: Jobs) -> None:
    job = jobs.add("train", "law", {"examples": ["rows.jsonl"], "limit": None})
    assert jobs.get(job.id) == job
    assert (job.kind, job.name, job.state, job.over) == ("train", "law", "queued", False)
    assert job.plan == {"examples": ["rows.jsonl"], "limit": None}
    assert job.created.endswith("+00:00")


def test_jobs_are_taken_in_the_order_in_which_they_came(jobs: Jobs) -> None:
    added = [jobs.add("train", name, {}) for name in "abc"]
    assert [job.id for job in jobs.latest(2)] == [added[2].id, added[1].id]
    taken = [jobs.take(7) for _ in added]
    assert [job and job.id for job in taken] == [job.id for job in added]
    assert all(job and (job.state, job.worker, job.attempts) == ("running", 7, 1) for job in taken)
    assert jobs.take(7) is None


def test_jobs_that_come_at_once_all_get_a_turn(jobs: Jobs) -> None:
    with ThreadPoolExecutor(8) as pool:
        added = {job.id for job in pool.map(lambda at: jobs.add("train", f"law{at}", {}), range(24))}
    taken = [jobs.take(1) for _ in added]
    assert {job.id for job in taken if job} == added


def test_a_job_is_found_by_the_beginning_of_its_id(jobs: Jobs) -> None:
    for job_id in ("aa11bb22", "aa33cc44"):
        jobs.add("train", "law", {}, job_id=job_id)
    assert jobs.find("aa1").id == "aa11bb22"
    assert jobs.find("aa33cc44").id == "aa33cc44"
    with pytest.raises(InvalidRequest, match="aa11bb22, aa33cc44"):
        jobs.find("aa")
    for unknown in ("b", "", "%", "a_1", "aa11bb22x"):
        with pytest.raises(UnknownJob, match="collegium jobs list"):
            jobs.find(unknown)
    with pytest.raises(UnknownJob):
        jobs.get("aa")


def test_where_a_job_stands_is_noted_while_it_runs_only(jobs: Jobs) -> None:
    job = running(jobs)
    assert jobs.advance(job.id, "train", 3, 10, loss=math.nan, eta=1.5)
    noted = jobs.get(job.id)
    assert (noted.stage, noted.step, noted.of, noted.loss, noted.eta) == ("train", 3, 10, None, 1.5)
    done = jobs.end(job.id, "done", report={"score": 0.5, "odd": [math.inf, {"deep": math.nan}]})
    assert (done.state, done.report, done.worker, done.eta) == (
        "done",
        {"score": 0.5, "odd": [None, {"deep": None}]},
        None,
        None,
    )
    assert done.ended
    assert not jobs.advance(job.id, "train", 4, 10, loss=None, eta=None)
    assert jobs.get(job.id) == done
    assert jobs.end(job.id, "failed", error="late").state == "done"


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_soon(jobs: Jobs) -> None:
    job = running(jobs)
    queued = jobs.add("train", "tax", {})
    assert jobs.cancel(queued.id).state == "cancelled"
    assert jobs.wanted(job.id)
    asked = jobs.cancel(job.id)
    assert (asked.state, asked.cancel) == ("running", True)
    assert not jobs.wanted(job.id)
    jobs.end(job.id, "cancelled")
    for over in (job, queued):
        with pytest.raises(InvalidRequest, match="is cancelled"):
            jobs.cancel(over.id)


def test_failed_and_cancelled_jobs_are_taken_up_again_last(jobs: Jobs) -> None:
    job = running(jobs)
    other = jobs.add("train", "tax", {})
    with pytest.raises(InvalidRequest, match="is running"):
        jobs.resume(job.id)
    jobs.cancel(job.id)
    jobs.end(job.id, "cancelled", error="why")
    again = jobs.resume(job.id)
    assert (again.state, again.error, again.ended, again.cancel, again.attempts) == ("queued", None, None, False, 0)
    order = [jobs.take(1), jobs.take(1)]
    assert [one and one.id for one in order] == [other.id, job.id]
    jobs.end(job.id, "done")
    with pytest.raises(InvalidRequest, match=r"is done\. Only failed and cancelled"):
        jobs.resume(job.id)


def test_a_job_whose_process_died_goes_back_to_its_place_some_times(jobs: Jobs) -> None:
    job = running(jobs)
    jobs.add("train", "tax", {})
    for attempt in range(1, ATTEMPTS):
        (left,) = jobs.recover()
        assert (left.id, left.state, left.attempts) == (job.id, "queued", attempt)
        taken = jobs.take(1)
        assert taken
        assert taken.id == job.id
    (failed,) = jobs.recover()
    assert failed.state == "failed"
    assert "killed 3 times; the system may have run out of memory" in str(failed.error)
    assert jobs.recover() == []


def test_a_job_that_was_cancelled_when_its_process_died_stays_cancelled(jobs: Jobs) -> None:
    job = running(jobs)
    jobs.cancel(job.id)
    assert [left.state for left in jobs.recover()] == ["cancelled"]


def test_being_told_to_stop_is_no_failed_attempt(jobs: Jobs) -> None:
    job = running(jobs)
    put_back = jobs.put_back(job.id)
    assert (put_back.state, put_back.attempts, put_back.worker) == ("queued", 0, None)


def test_an_error_may_quote_what_no_database_takes(jobs: Jobs) -> None:
    assert jobs.end(running(jobs).id, "failed", error="got \ud800").error == "got ?"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_steps_are_noted_twice_a_second_and_the_last_one_always(jobs: Jobs, tmp_path: Path, clock: Clock) -> None:
    job = running(jobs)
    watch = Monitor(jobs, job.id, tmp_path, clock).watch
    seen: list[tuple[str, int]] = []
    advance = jobs.advance

    def counted(job_id: str, stage: str, step: int, of: int, **more: Any) -> bool:
        seen.append((stage, step))
        return advance(job_id, stage, step, of, **more)

    with patch.object(jobs, "advance", counted):
        for step in range(101):
            watch.progress("train", step, 100)
            clock.now += 0.01
        watch.progress("measure", 0, 0)
    assert seen == [("train", 0), ("train", 50), ("train", 100), ("measure", 0)]


def test_the_time_left_is_that_of_this_stage_and_process(jobs: Jobs, tmp_path: Path, clock: Clock) -> None:
    job = running(jobs)
    monitor = Monitor(jobs, job.id, tmp_path, clock)
    monitor.watch.progress("train", 40, 100)  # it was begun by another process
    assert jobs.get(job.id).eta is None
    clock.now += 10
    monitor.watch.progress("train", 60, 100)
    assert jobs.get(job.id).eta == 20
    clock.now += 0.2
    monitor.watch.progress("train", 61, 100)
    monitor.watch.loss(61, 2.5)
    assert jobs.get(job.id).step == 60
    monitor.flush()
    assert (jobs.get(job.id).step, jobs.get(job.id).loss) == (61, 2.5)
    monitor.watch.progress("other", 0, 0)
    assert jobs.get(job.id).eta is None


@pytest.mark.parametrize("heard", ["progress", "loss"])
def test_a_cancelled_job_hears_of_it_at_its_next_step(jobs: Jobs, tmp_path: Path, clock: Clock, heard: str) -> None:
    job = running(jobs)
    watch = Monitor(jobs, job.id, tmp_path, clock).watch
    watch.progress("train", 1, 100)
    jobs.cancel(job.id)
    clock.now += 0.2
    with pytest.raises(Cancelled, match=job.id):
        watch.progress("train", 2, 100) if heard == "progress" else watch.loss(2, 1.0)


def test_a_note_that_cannot_be_written_does_not_stop_the_work(jobs: Jobs, tmp_path: Path) -> None:
    watch = Monitor(jobs, running(jobs).id, tmp_path).watch
    with patch.object(jobs, "advance", side_effect=NoSpace("full")):
        watch.progress("train", 1, 1)


def test_losses_survive_and_count_once(tmp_path: Path) -> None:
    assert read_losses(tmp_path) == []
    for step, loss in ((10, 3.0), (20, 2.0), (30, math.nan)):
        append_loss(tmp_path, Loss("train", step, loss))
    append_loss(tmp_path, Loss("prefer", 10, 0.7))
    with (tmp_path / FILE).open("a") as file:
        file.write('\n{"stage": "train", "st')  # killed in mid-line
    append_loss(tmp_path, Loss("train", 20, 1.5))  # a process after it, from its last checkpoint
    assert read_losses(tmp_path) == [Loss("train", 10, 3.0), Loss("train", 20, 1.5), Loss("prefer", 10, 0.7)]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 30), st.floats(0, 9)), max_size=40), st.data())
def test_whatever_is_written_and_cut_off_steps_rise(rows: list[tuple[str, int, float]], data: st.DataObject) -> None:
    text = "".join("\n" + json.dumps({"stage": stage, "step": step, "loss": loss}) for stage, step, loss in rows)
    cut = text[: data.draw(st.integers(0, len(text)))]
    with patch.object(Path, "read_text", return_value=cut):
        read = read_losses(Path())
    whole = [(stage, step, loss) for stage, step, loss in rows[: sum(line.endswith("}") for line in cut.split("\n"))]]
    for stage in {one.stage for one in read}:
        steps = [one.step for one in read if one.stage == stage]
        assert steps == sorted(set(steps))
        assert steps[-1] == [step for name, step, _ in whole if name == stage][-1]


def test_an_older_database_gets_the_queue_and_keeps_what_it_holds(tmp_path: Path) -> None:
    from alembic import command
    from alembic.config import Config

    url = f"sqlite:///{tmp_path}/older.db"
    engine = sa.create_engine(url)
    config = Config()
    config.set_main_option("script_location", "collegium.experts:migrations")
    decision = {"created": "2026-01-01", "prompt_hash": "h", "embedding": b"\0\0", "encoder": "e", "release": 1}
    decision |= {"router": "r", "expert": "law", "reason": "routed", "confidence": 0.5, "body": {"domains": None}}
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        body = {"aliases": {}, "router": "r", "indexes": {}}
        connection.execute(sa.insert(tables.releases).values(parent=None, note="kept", created="2026", body=body))
        connection.execute(sa.update(tables.live).values(release=1))
        connection.execute(sa.insert(tables.decisions).values(**decision))
        assert not sa.inspect(connection).has_table("jobs")
    engine.dispose()
    upgraded = Registry.open(url)
    live = upgraded.live()
    assert live
    assert live.note == "kept"
    with upgraded.engine.connect() as connection:
        assert connection.scalar(sa.select(tables.decisions.c.expert)) == "law"
    assert Jobs(upgraded).add("train", "law", {}).state == "queued"
    upgraded.close()
