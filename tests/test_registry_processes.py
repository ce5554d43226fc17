from __future__ import annotations

import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from collegium.experts.registry import Registry
from collegium.schema import Card, Lora

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PUBLISHER = """
import sys
from collegium.experts.registry import Registry
from collegium.schema import Card, Lora
url, me, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
registry = Registry.open(url)
for number in range(rounds):
    card = Card(f"{me}-{number % 7}", me, Lora(f"{number:064x}", 8), "base")
    change = {"aliases": {card.name: card.version}, "indexes": {f"{me}-{number}": "i"}}
    release = registry.publish(cards=[card], router="r", note=me, **change)
    print(release.id, card.version, flush=True)
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/home/registry.db"


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    registry = Registry.open(url)
    yield registry
    registry.close()


def publisher(url: str, me: str, rounds: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, url, me, str(rounds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()


def assert_whole(registry: Registry) -> None:
    """Every release is complete and names cards that exist, and the newest one is live."""
    releases = registry.releases()
    versions = {known.version for known in registry.cards()}
    for release in releases:
        assert versions.issuperset(release.aliases.values())
        assert release.router == "r"
    assert registry.live() == (releases[0] if releases else None)


def test_threads_publish_at_once_and_all_survive(registry: Registry) -> None:
    registry.publish(router="r", note="")

    def publish(number: int) -> int:
        mine = Card(f"law{number}", "law", Lora("0" * 64, 8), "base")
        return registry.publish(cards=[mine], aliases={mine.name: mine.version}, note="").id

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(publish, range(24))) == list(range(2, 26))
    live = registry.live()
    assert live
    assert set(live.aliases) == {f"law{number}" for number in range(24)}


def test_two_processes_open_an_empty_database_and_publish_at_once(url: str) -> None:
    processes = [publisher(url, me, 25) for me in ("law", "tax")]
    for process in processes:
        go(process)
    for process in processes:
        assert len(process.communicate(timeout=60)[0].splitlines()) == 25
        assert process.returncode == 0
    registry = Registry.open(url)
    assert_whole(registry)
    live = registry.live()
    assert live
    assert set(live.aliases) == {f"{me}-{number}" for me in ("law", "tax") for number in range(7)}
    assert set(live.indexes) == {f"{me}-{number}" for me in ("law", "tax") for number in range(25)}
    assert [release.parent for release in registry.releases()] == [*range(49, 0, -1), None]
    registry.close()


def test_kill_9_loses_nothing_that_was_acknowledged(url: str) -> None:
    acknowledged: dict[int, str] = {}
    for warm in (False, True, True):  # the first is killed while it opens and migrates, or soon after
        with publisher(url, "law", 100_000) as process:
            assert process.stdout
            go(process)
            lines = [process.stdout.readline()] if warm else []
            time.sleep(random.uniform(0.0, 0.25))
            process.kill()
            lines += process.stdout.readlines()
        acknowledged |= {int(number): version for number, version in map(str.split, lines)}
        registry = Registry.open(url)
        assert_whole(registry)
        releases = {release.id: release for release in registry.releases()}
        for number, version in acknowledged.items():
            assert version in releases[number].aliases.values()
        registry.close()
    assert acknowledged
