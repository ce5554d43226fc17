from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collegium.errors import ArtifactCorrupt, InvalidRequest, NoSpace
from collegium.experts.artifacts import STALE, ArtifactStore, tree_hash

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PUTTER = """
import sys
from pathlib import Path
from collegium.experts.artifacts import ArtifactStore
store, sources = ArtifactStore(Path(sys.argv[1])), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for source in sorted(sources.iterdir()):
    print(store.put(source), flush=True)
"""


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", {"adapter_config.json": b"{}", "deep/er/weights.safetensors": b"\0" * 5000})


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "home" / "artifacts")


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def putter(store: ArtifactStore, sources: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PUTTER, str(store.root), str(sources)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    assert process.stdin
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def test_put_hands_out_an_equal_folder(store: ArtifactStore, adapter: Path) -> None:
    version = store.put(adapter)
    assert re.fullmatch("[0-9a-f]{64}", version)
    assert version == tree_hash(adapter) == tree_hash(store.path(version))
    assert content(store.path(version)) == content(store.verify(version)) == content(adapter)


def test_put_is_idempotent_and_leaves_nothing_else(store: ArtifactStore, adapter: Path) -> None:
    assert store.put(adapter) == store.put(adapter)
    assert [path.name for path in store.root.iterdir()] == [tree_hash(adapter)]


def test_the_source_may_change_afterwards(store: ArtifactStore, adapter: Path) -> None:
    version = store.put(adapter)
    (adapter / "adapter_config.json").write_bytes(b"[]")
    store.verify(version)
    assert store.put(adapter) != version


names = st.text("ab.é/ \\%", min_size=1, max_size=6).filter(lambda name: all(p.strip(". ") for p in name.split("/")))
trees = st.dictionaries(names, st.binary(max_size=8), min_size=1, max_size=4).filter(
    lambda tree: not any(other.startswith(f"{name}/") for name in tree for other in tree)
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=trees, two=trees)
def test_hashes_are_equal_exactly_where_the_files_are(
    tmp_path: Path, one: dict[str, bytes], two: dict[str, bytes]
) -> None:
    hashes = []
    for tree in (one, two, dict(reversed(one.items()))):
        shutil.rmtree(tmp_path / "tree", ignore_errors=True)
        hashes.append(tree_hash(write(tmp_path / "tree", tree)))
    assert hashes[0] == hashes[2]
    assert (hashes[0] == hashes[1]) == (one == two)


def link_to_a_file(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "adapter_config.json")
    return folder / "link"


def link_to_a_folder(folder: Path) -> Path:
    (folder / "link").symlink_to(folder.parent)
    return folder / "link"


def dangling_link(folder: Path) -> Path:
    (folder / "deep" / "link").symlink_to("nowhere")
    return folder / "deep" / "link"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "deep" / "pipe")
    return folder / "deep" / "pipe"


@pytest.mark.parametrize("add", [link_to_a_file, link_to_a_folder, dangling_link, pipe])
def test_links_and_special_files_are_refused_by_name(
    store: ArtifactStore, adapter: Path, add: Callable[[Path], Path]
) -> None:
    odd = add(adapter)
    with pytest.raises(InvalidRequest, match=re.escape(str(odd))):
        store.put(adapter)
    with pytest.raises(InvalidRequest, match=re.escape(str(odd))):
        tree_hash(adapter)
    assert not list(store.root.iterdir())


def test_what_is_no_folder_of_files_is_refused(store: ArtifactStore, tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    for wrong in (tmp_path / "missing", tmp_path / "empty", adapter / "adapter_config.json"):
        with pytest.raises(InvalidRequest, match=re.escape(str(wrong))):
            store.put(wrong)


@pytest.mark.parametrize("version", ["", "..", "../" * 20 + "etc", "A" * 64, "0" * 63])
def test_what_is_no_hash_is_refused(store: ArtifactStore, version: str) -> None:
    with pytest.raises(InvalidRequest, match="64 hex digits"):
        store.path(version)


def test_a_missing_artifact_is_named(store: ArtifactStore) -> None:
    for read in (store.path, store.verify):
        with pytest.raises(ArtifactCorrupt, match="0" * 64):
            read("0" * 64)


def flip(folder: Path) -> str:
    (folder / "deep/er/weights.safetensors").write_bytes(b"\0" * 4999 + b"\1")
    return "deep/er/weights.safetensors has changed"


def shorten(folder: Path) -> str:
    (folder / "adapter_config.json").write_bytes(b"")
    return "adapter_config.json has changed"


def lose(folder: Path) -> str:
    (folder / "adapter_config.json").unlink()
    flip(folder)
    return "adapter_config.json is missing"


def slip_in(folder: Path) -> str:
    (folder / "deep" / "evil.bin").write_bytes(b"")
    return "deep/evil.bin is extra"


def slip_in_a_link(folder: Path) -> str:
    return f"{link_to_a_file(folder)} is a link"


def lose_the_manifest(folder: Path) -> str:
    (folder.parent / "manifest.json").unlink()
    return "manifest.json"


def forge_the_manifest(folder: Path) -> str:
    (folder.parent / "manifest.json").write_text('[["adapter_config.json", "00", 2]]')
    return "manifest.json"


def garble_the_manifest(folder: Path) -> str:
    (folder.parent / "manifest.json").write_text('[["adapter_config')
    return "manifest.json"


@pytest.mark.parametrize(
    "damage",
    [flip, shorten, lose, slip_in, slip_in_a_link, lose_the_manifest, forge_the_manifest, garble_the_manifest],
)
def test_damage_is_named(store: ArtifactStore, adapter: Path, damage: Callable[[Path], str]) -> None:
    version = store.put(adapter)
    expected = damage(store.path(version))
    with pytest.raises(ArtifactCorrupt, match=re.escape(expected)) as caught:
        store.verify(version)
    assert version in caught.value.message
    assert caught.value.hint
    with pytest.raises(ArtifactCorrupt):  # putting it again does not claim that all is well
        store.put(adapter)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing(
    store: ArtifactStore, adapter: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(_: int) -> None:
        raise OSError(code, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(NoSpace):
            store.put(adapter)
    assert not list(store.root.iterdir())
    store.verify(store.put(adapter))


def test_only_old_leftovers_are_removed(store: ArtifactStore, adapter: Path) -> None:
    version = store.put(adapter)
    old, young = store.root / ".put-old", store.root / ".put-young"
    for folder in (old, young):
        write(folder, {"files/half": b"x"})
    for folder in (old, store.root / version):
        os.utime(folder, times=(0, time.time() - STALE - 60))
    ArtifactStore(store.root)
    assert not old.exists()
    assert young.exists()
    store.verify(version)


def test_threads_put_the_same_at_once(store: ArtifactStore, adapter: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        versions = set(pool.map(store.put, [adapter] * 16))
    assert [path.name for path in store.root.iterdir()] == list(versions)
    store.verify(versions.pop())


def test_processes_put_the_same_at_once(store: ArtifactStore, tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    for number in range(30):
        write(sources / f"{number:02}", {"a": bytes([number]) * 1000, "b/c": b""})
    processes = [putter(store, sources) for _ in range(2)]
    for process in processes:
        start(process)
    first, second = (process.communicate(timeout=60)[0].split() for process in processes)
    assert first == second == [tree_hash(source) for source in sorted(sources.iterdir())]
    assert {path.name for path in store.root.iterdir()} == set(first)
    for version in first:
        store.verify(version)


def test_a_killed_put_is_never_visible_and_an_acknowledged_one_stays(store: ArtifactStore, tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    for number in range(200):
        write(sources / f"{number:03}", {f"{name}": bytes([number]) * 40_000 for name in "abcd"})
    for _ in range(4):
        process = putter(store, sources)
        start(process)
        time.sleep(random.uniform(0.01, 0.15))
        process.kill()
        acknowledged = set(process.communicate(timeout=60)[0].split())
        visible = {path.name for path in store.root.iterdir() if not path.name.startswith(".put-")}
        assert acknowledged <= visible
        for version in visible:
            store.verify(version)
    assert len(visible) < 200, "every put had ended before the kill"
