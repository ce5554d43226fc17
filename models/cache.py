"""The cache of ready models: fetched, checked, converted, and only then visible.

A model becomes visible by one rename, so a killed process leaves nothing half-made; a lock a model keeps two processes that
start at once from doing the work twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import ChecksumMismatch, ModelUnavailable
from ..schema import digest
from .catalogue import KNOWN_SHA256
from .convert import convert_gguf
from .fetch import Progress, fetch
from .names import parse_name
from .space import space_for

MANIFEST = "collegium.json"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A folder that transformers loads. `identity` is the architecture and the hash of the source's weight files."""

    name: str
    folder: Path
    architecture: str
    identity: str


class ModelCache:
    """Models by name under `root`; `timeout` is in seconds without a byte."""

    def __init__(self, root: Path, *, timeout: float = 60.0) -> None:
        self._root = root
        self._timeout = timeout

    def get(self, name: str, progress: Progress | None = None) -> CachedModel:
        """The model, fetched and converted if this is the first time.

        Raises ModelUnavailable or one of its kin; what they say includes what to do.
        """
        parsed = parse_name(name)
        if parsed.source == "folder":
            self._root.mkdir(parents=True, exist_ok=True)
            return self._local(name, Path(parsed.location))

        def make(ready: Path) -> dict[str, str]:
            source = ready.with_name("source")
            source.mkdir()
            fetch(parsed, source, timeout=self._timeout, progress=progress)
            hashes = _check(name, source)
            _convert(source, ready, progress)
            return hashes

        return self._once(parsed.slug, name, make)

    def derive(self, slug: str, name: str, build: Callable[[Path], None]) -> CachedModel:
        """A model that is made of others: the first time, `build` writes a transformers folder.

        `name` names what it is made of by content, and that is its identity: its weights are sums, which differ in the last
        digits from machine to machine. Raises NoSpace, and what `build` raises.
        """

        def make(ready: Path) -> dict[str, str]:
            build(ready)
            return {"source": digest(name)}

        return self._once(slug, name, make)

    def _once(self, slug: str, name: str, make: Callable[[Path], Mapping[str, str]]) -> CachedModel:
        """The model in `slug`. The first time, `make` writes it and gives its hashes; what lies beside it is dropped."""
        from filelock import FileLock

        self._root.mkdir(parents=True, exist_ok=True)
        final = self._root / slug
        if not (final / MANIFEST).exists():
            with FileLock(self._root / f"{slug}.lock"):
                if not (final / MANIFEST).exists():  # another process may have made it while we waited
                    self._make(name, final, make)
        return _read(final)

    def _make(self, name: str, final: Path, make: Callable[[Path], Mapping[str, str]]) -> None:
        partial = self._root / f".partial-{final.name}"
        for leftover in (partial, final):  # we hold the lock: what is here was left by a process that died
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        ready = partial / "ready"
        try:
            with space_for(partial):
                _write_manifest(name, ready, make(ready))
                sync_tree(ready)
                ready.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _local(self, name: str, folder: Path) -> CachedModel:
        """A user's own folder: its hashes are remembered beside the cache until a file changes."""
        stamp = digest([[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in _weights(folder)])
        record = self._root / f"local-{digest(str(folder))[:16]}.json"
        if record.exists() and (known := json.loads(record.read_text("utf-8")))["stamp"] == stamp:
            return CachedModel(name, folder, known["architecture"], known["identity"])
        architecture = _architecture(folder)
        identity = _identity(architecture, {path.name: sha256(path) for path in _weights(folder)})
        temporary = record.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"stamp": stamp, "architecture": architecture, "identity": identity}), "utf-8")
        temporary.replace(record)
        return CachedModel(name, folder, architecture, identity)


def _convert(source: Path, ready: Path, progress: Progress | None) -> None:
    gguf = sorted(source.rglob("*.gguf"))
    if not gguf:
        source.rename(ready)
        return
    if progress:
        progress(f"Converting {gguf[0].name}", 0, 0)
    convert_gguf(gguf[0], ready)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(name: str, source: Path) -> dict[str, str]:
    hashes = {path.name: sha256(path) for path in _weights(source)}
    for file, expected in KNOWN_SHA256.get(name, {}).items():
        if hashes.get(file) != expected:
            raise ChecksumMismatch(
                f"{file} of {name} has SHA-256 {hashes.get(file)}, expected {expected}.",
                hint="It was changed on the way or at its source; do not use it. Try again from another network.",
            )
    return hashes


def _weights(folder: Path) -> list[Path]:
    found = [*folder.rglob("*.safetensors"), *folder.rglob("*.gguf")]
    if not found:
        raise ModelUnavailable(f"{folder} holds no safetensors weights.", hint="Name a transformers model folder.")
    return sorted(found)


def _architecture(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text("utf-8"))["architectures"][0])
    except (OSError, ValueError, LookupError):
        raise ModelUnavailable(
            f"{folder} has no config.json that names an architecture.", hint="Name a transformers model folder."
        ) from None


def _identity(architecture: str, hashes: Mapping[str, str]) -> str:
    return f"{architecture}:{digest(sorted(hashes.values()))[:16]}"


def _write_manifest(name: str, folder: Path, hashes: Mapping[str, str]) -> None:
    architecture = _architecture(folder)
    model = CachedModel(name, folder, architecture, _identity(architecture, hashes))
    body = asdict(model) | {"sha256": dict(hashes)}
    del body["folder"]
    (folder / MANIFEST).write_text(json.dumps(body, indent=1), "utf-8")


def _read(folder: Path) -> CachedModel:
    body = json.loads((folder / MANIFEST).read_text("utf-8"))
    return CachedModel(body["name"], folder, body["architecture"], body["identity"])


def sync_tree(folder: Path) -> None:
    """Put the content of every file below `folder` on the disk for good, so that a rename may show it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
