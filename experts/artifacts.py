"""Immutable folders by content hash: adapters, routers and indexes, as files that nothing changes once they are named.

On disk an artifact is `root/<hash>/manifest.json` beside `root/<hash>/files/`, which is what callers are handed: a
plain folder that PEFT and others load as it is. One rename makes both visible, so half an artifact is never seen.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ArtifactCorrupt, InvalidRequest, NoSpace
from ..schema import digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

STALE = 24 * 3600.0  # seconds after which an unfinished `put` is surely one of a dead process
_TEMPORARY = ".put-"
_RESTORE = "Restore its folder from a backup; or delete it, and register again what it was made from."


class Entry(NamedTuple):
    """One file of an artifact: its path inside the folder (posix), its SHA-256 and its size in bytes."""

    path: str
    sha256: str
    size: int


class ArtifactStore:
    """Folders under `root`, each named by the hash of its content. Any number of processes may share one."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        _remove_stale(root)

    def put(self, folder: Path) -> str:
        """Copy `folder` into the store and return its content hash, once the copy is on the disk for good.

        Empty sub-folders are not kept. The same content twice is stored once. Raises InvalidRequest for a folder that
        is missing, empty, or holds links or special files, NoSpace on a full disk, and ArtifactCorrupt where the
        content is stored already but is no longer what it was.
        """
        sources = _files(folder)
        if not sources:
            raise InvalidRequest(f"{folder} holds no files.")
        temporary = self.root / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            with _space(self.root):
                version = _fill(temporary, sources)
                stored = _rename(temporary, self.root / version)
                _sync(self.root)  # also where another was first: it may not have come to this yet
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if not stored:
            self.verify(version)
        return version

    def path(self, version: str) -> Path:
        """Return the folder of an artifact, unchecked. Raises ArtifactCorrupt where it is missing."""
        if not re.fullmatch("[0-9a-f]{64}", version):
            raise InvalidRequest(f"{version!r} is not the hash of an artifact, which is 64 hex digits.")
        files = self.root / version / "files"
        if not files.is_dir():
            raise ArtifactCorrupt(f"The artifact {version} is missing in {self.root}.", hint=_RESTORE)
        return files

    def verify(self, version: str) -> Path:
        """Check every byte and return the folder. Raises ArtifactCorrupt, which names the first wrong file."""
        files = self.path(version)
        wrong = _first_difference(self._manifest(version), files)
        if wrong:
            raise ArtifactCorrupt(f"The artifact {version} is damaged: {wrong}, in {files}.", hint=_RESTORE)
        return files

    def _manifest(self, version: str) -> dict[str, Entry]:
        path = self.root / version / "manifest.json"
        try:
            entries = [Entry(*row) for row in json.loads(path.read_bytes())]
        except (FileNotFoundError, ValueError, TypeError):
            entries = []
        if digest(entries) != version:
            raise ArtifactCorrupt(f"The artifact {version} has lost its list of files, {path}.", hint=_RESTORE)
        return {entry.path: entry for entry in entries}


def tree_hash(folder: Path) -> str:
    """Hash a folder: SHA-256 over its sorted (path, SHA-256, size), whatever dates and modes its files have.

    Raises InvalidRequest for links and special files, as `ArtifactStore.put` does.
    """
    return digest([_entry(name, path) for name, path in _files(folder).items()])


def _files(folder: Path) -> dict[str, Path]:
    """Every file below `folder` by its posix path, sorted."""
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is not a folder.")
    return {path.relative_to(folder).as_posix(): path for path in sorted(_walk(folder), key=Path.as_posix)}


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        # A link could show the store what lies outside the folder, and change after it was hashed.
        if path.is_symlink():
            raise InvalidRequest(f"{path} is a link.", hint="Put the file itself there: artifacts hold no links.")
        if path.is_dir():
            yield from _walk(path)
        elif path.is_file():
            yield path
        else:
            raise InvalidRequest(f"{path} is not a regular file.", hint="Artifacts hold files and folders only.")


def _entry(name: str, path: Path) -> Entry:
    with path.open("rb") as file:
        return Entry(name, hashlib.file_digest(file, "sha256").hexdigest(), file.tell())


def _first_difference(expected: Mapping[str, Entry], folder: Path) -> str | None:
    try:
        found = _files(folder)
    except InvalidRequest as error:
        return error.message.rstrip(".")
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is extra"
        if _entry(name, found[name]) != expected[name]:
            return f"{name} has changed"
    return None


def _fill(temporary: Path, sources: Mapping[str, Path]) -> str:
    """Copy files and manifest, durably. The hash is that of the copy: a source may change while it is read."""
    entries = []
    for name, source in sources.items():
        target = temporary / "files" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as reader, target.open("xb") as writer:
            shutil.copyfileobj(reader, writer)
        entries.append(_entry(name, target))
    (temporary / "manifest.json").write_text(json.dumps(entries), "utf-8")
    for path in (temporary, *temporary.rglob("*")):
        _sync(path)
    return digest(entries)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(temporary: Path, target: Path) -> bool:
    """Make it visible; False where another was first."""
    try:
        temporary.rename(target)
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise
        return False
    return True


def _remove_stale(root: Path) -> None:
    for path in root.glob(f"{_TEMPORARY}*"):
        try:
            stale = path.stat().st_mtime < time.time() - STALE
        except FileNotFoundError:
            continue  # its process has just finished
        if stale:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _space(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise NoSpace(f"No space is left for {root}.", hint="Free some space there, then try again.") from error
