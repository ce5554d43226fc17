"""The decision log: what is put in comes back, nobody waits for it, and it forgets what is too old."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from collegium.experts import decisions
from collegium.experts.decisions import DecisionLog, Logged, latest
from collegium.experts.registry import Registry
from collegium.schema import Decision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

NOW = datetime.now(UTC)
WRITER = """
import itertools, sys, time
import numpy as np
from collegium.experts.decisions import DecisionLog, Logged, latest
from collegium.experts.registry import Registry
from collegium.schema import Decision
registry = Registry.open(sys.argv[1])
log = DecisionLog(registry, keep_text=True, days=30)
decision = Decision("law", (("law", 1.0),), {"law": 1.0}, ("law",), 1.0, "routed", 0.5, "r")
for number in itertools.count():
    log.put(Logged(decision, np.full(384, number, np.float32), "e", 1, str(number)))
    time.sleep(0.0005)
    if number % 32 == 0 and (seen := latest(registry, 1)):
        print(seen[0].text, flush=True)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


@pytest.fixture
def registry(file: Path) -> Iterator[Registry]:
    with closing(Registry.open(f"sqlite:///{file}")) as opened:
        yield opened


@pytest.fixture(scope="module")
def shared_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with closing(Registry.open(f"sqlite:///{tmp_path_factory.mktemp('shared')}/registry.db")) as opened:
        yield opened


def open_log(registry: Registry, *, keep_text: bool = True, days: int = 30) -> closing[DecisionLog]:
    return closing(DecisionLog(registry, keep_text=keep_text, days=days))


def decision(domain: str | None = "law", **changes: Any) -> Decision:
    values: dict[str, Any] = {
        "domain": domain,
        "candidates": ((domain or "base", 1.0),),
        "probabilities": {"law": 0.75, "code": 0.25},
        "prediction_set": ("law",),
        "confidence": 0.75,
        "reason": "routed" if domain else "unknown_domain",
        "threshold": 0.5,
        "router_version": "r1",
    }
    return Decision(**(values | changes))


def logged(text: str = "what is a tort", domain: str | None = "law", **changes: Any) -> Logged:
    values: dict[str, Any] = {"embedding": np.linspace(-1, 1, 8, dtype=np.float32), "encoder": "bert", "release": 3}
    return Logged(decision(domain), **(values | {"text": text} | changes))


def texts(registry: Registry, count: int = 10_000) -> list[str | None]:
    return [one.text for one in latest(registry, count)]


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def busy(registry: Registry, file: Path) -> Iterator[sqlite3.Connection]:
    """Another process that writes and does not let go until it is closed."""
    with closing(sqlite3.connect(file, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


@pytest.fixture
def impatient() -> Iterator[None]:
    """A database that is busy says so at once."""

    def listener(connection: Any, *_: object) -> None:
        connection.execute("PRAGMA busy_timeout = 1").close()

    sa.event.listen(sa.Pool, "checkout", listener)
    yield
    sa.event.remove(sa.Pool, "checkout", listener)


@pytest.fixture
def threads() -> Callable[[], int]:
    """Counts the threads that the test has started and that still run."""
    others = set(threading.enumerate())
    return lambda: len(set(threading.enumerate()) - others)


names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=8)
shares = st.floats(0, 1)
decisions_of_any_kind = st.builds(
    Decision,
    domain=st.none() | names,
    candidates=st.lists(st.tuples(names, shares), min_size=1, max_size=3).map(tuple),
    probabilities=st.dictionaries(names, shares, min_size=1, max_size=4),
    prediction_set=st.lists(names, max_size=3).map(tuple),
    confidence=shares,
    reason=st.sampled_from(["routed", "unknown_domain", "no_expert", "explicit", "sticky", "degraded"]),
    threshold=shares,
    router_version=names,
)


@settings(max_examples=25)
@given(
    decisions_of_any_kind,
    hnp.arrays(np.float32, st.integers(1, 8), elements=st.floats(-1, 1, width=32)),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    st.none() | st.lists(names, min_size=1, max_size=3).map(tuple),
)
def test_what_is_put_in_comes_back(
    shared_registry: Registry,
    decision: Decision,
    embedding: NDArray[np.float32],
    text: str,
    domains: tuple[str, ...] | None,
) -> None:
    one = Logged(decision, embedding, "bert", 3, text, domains=domains)
    with open_log(shared_registry) as log:
        log.put(one)
    (stored,) = latest(shared_registry, 1)
    assert stored.decision == decision
    assert (stored.encoder, stored.release, stored.text, stored.domains) == ("bert", 3, text, domains)
    assert stored.prompt_hash == sha256(text.encode()).hexdigest()
    assert abs(stored.created - one.created) < timedelta(milliseconds=1)
    assert stored.embedding.dtype == np.float32
    np.testing.assert_allclose(stored.embedding, embedding, atol=5e-4)


def test_the_text_is_kept_only_where_it_is_wanted(registry: Registry, file: Path) -> None:
    with open_log(registry, keep_text=False) as log:
        log.put(logged("my secret illness"))
    (stored,) = latest(registry, 1)
    assert stored.text is None
    assert stored.prompt_hash == sha256(b"my secret illness").hexdigest()
    for path in file.parent.iterdir():
        assert b"illness" not in path.read_bytes()


def test_the_newest_come_first_by_domain_and_since(registry: Registry) -> None:
    with open_log(registry) as log:
        for hours, domain in enumerate(("law", "code", None, "law")):
            log.put(logged(str(hours), domain, created=NOW + timedelta(hours=hours)))
    assert texts(registry, 3) == ["3", "2", "1"]
    assert [one.text for one in latest(registry, 9, domain="law")] == ["3", "0"]
    assert [one.text for one in latest(registry, 9, since=NOW + timedelta(hours=1.5))] == ["3", "2"]
    assert [one.text for one in latest(registry, 9, domain="law", since=NOW + timedelta(hours=1))] == ["3"]


def test_rows_are_written_within_about_a_second(registry: Registry) -> None:
    with open_log(registry) as log:
        log.put(logged("first"))
        wait_for(lambda: texts(registry) == ["first"])


def test_a_whole_batch_does_not_wait(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "EVERY", 3600.0)
    with open_log(registry) as log:
        for number in range(decisions.BATCH + 1):
            log.put(logged(str(number)))
        wait_for(lambda: len(texts(registry)) >= decisions.BATCH)
        assert len(texts(registry)) == decisions.BATCH
    assert len(texts(registry)) == decisions.BATCH + 1


def test_nothing_runs_before_the_first_decision_or_after_close(registry: Registry, threads: Callable[[], int]) -> None:
    with open_log(registry):
        assert threads() == 0
    with open_log(registry) as log:
        log.put(logged("kept"))
        assert threads() == 1
    assert threads() == 0
    log.put(logged("too late"))
    assert threads() == 0
    assert texts(registry) == ["kept"]


def test_eight_threads_log_at_once(registry: Registry) -> None:
    expected = {f"{thread}-{number}" for thread in range(8) for number in range(100)}

    def put(thread: int) -> None:
        for number in range(100):
            log.put(logged(f"{thread}-{number}"))

    with open_log(registry) as log, ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(8)))
    assert len(texts(registry)) == 800
    assert set(texts(registry)) == expected
    assert log.dropped == 0


def test_of_too_many_that_wait_the_oldest_are_lost(
    registry: Registry, busy: sqlite3.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    with open_log(registry) as log:
        started = time.perf_counter()
        for number in range(decisions.WAITING + 100):
            log.put(logged(str(number)))
        assert time.perf_counter() - started < 1, "putting does not wait for the database"
        assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"
        assert 0 < log.dropped <= 100
        busy.close()
    found = {int(text or "") for text in texts(registry)}
    assert len(found) == decisions.WAITING + 100 - log.dropped
    assert found >= set(range(200, decisions.WAITING + 100)), "the newest are there"


def test_a_database_that_fails_once_loses_nothing(
    registry: Registry,
    busy: sqlite3.Connection,
    impatient: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decisions, "EVERY", 3600.0)  # closing does not wait to try again
    with open_log(registry) as log:
        for number in range(decisions.BATCH):
            log.put(logged(str(number)))
        wait_for(lambda: "tried once more" in caplog.text)
        busy.close()
    assert len(texts(registry)) == decisions.BATCH
    assert log.dropped == 0


def test_a_database_that_fails_twice_loses_a_batch_and_nothing_else(
    registry: Registry, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decisions, "EVERY", 0.01)
    with open_log(registry) as log, closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("ALTER TABLE decisions RENAME TO away")
        log.put(logged("one"))
        wait_for(lambda: log.dropped == 1)
        other.execute("ALTER TABLE away RENAME TO decisions")
        log.put(logged("two"))
    assert texts(registry) == ["two"]
    assert "1 decisions are lost" in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_closing_does_not_wait_for_ever(
    registry: Registry,
    busy: sqlite3.Connection,
    threads: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decisions, "CLOSING", 0.05)
    log = DecisionLog(registry, keep_text=True, days=30)
    log.put(logged())
    started = time.perf_counter()
    log.close()
    assert time.perf_counter() - started < 2
    assert "may be lost" in caplog.text
    busy.close()
    wait_for(lambda: threads() == 0)
    assert len(texts(registry)) == 1, "and what could be written after all was"


def test_rows_that_are_too_old_are_deleted_when_the_log_opens(registry: Registry) -> None:
    ages = {"old": 8, "new": 6}
    with open_log(registry, days=7) as log:
        for text, days in ages.items():
            log.put(logged(text, created=NOW - timedelta(days=days)))
    assert set(texts(registry)) == {"old", "new"}
    with open_log(registry, days=7) as log:
        log.put(logged("now"))
    assert texts(registry) == ["now", "new"]


def test_and_while_it_is_open(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "SWEEP", 0.05)
    monkeypatch.setattr(decisions, "EVERY", 0.01)
    with open_log(registry, days=7) as log:
        log.put(logged("old", created=NOW - timedelta(days=8)))
        log.put(logged("now"))
        wait_for(lambda: texts(registry) == ["now"])


def test_kill_9_loses_only_what_was_not_written(file: Path) -> None:
    url = f"sqlite:///{file}"
    with subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(3)]
        process.kill()
        lines += process.stdout.readlines()
    with closing(Registry.open(url)) as registry:
        rows = latest(registry, 1_000_000)
    numbers = sorted(int(row.text or "") for row in rows)
    assert numbers == list(range(len(numbers))), "whole batches, in order"
    assert len(numbers) > int(lines[-1])
    for row in rows:
        np.testing.assert_array_equal(row.embedding, np.full(384, np.float16(row.text), np.float32))
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
