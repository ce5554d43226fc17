"""An encoder in int8 through ONNX Runtime: what a CPU computes embeddings with.

It is made once a machine and kept in the user's cache folder. ONNX Runtime has threads of its own, beside those of the engine
and of torch: nothing keeps a prompt from being embedded while answers are written.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ..errors import UnsupportedModel
from ..schema import digest
from .cache import CachedModel, sha256
from .encoder import Floats, Ints, encoder_identity, pools_cls
from .load import cores

FORMAT = 2
"""Of the files in the cache: goes up where `export` would make another graph of the same model."""
KEPT = 8
"""Graphs that stay in the cache: those used last. One of all-MiniLM-L6-v2 takes 23 MB."""


class OnnxForward:
    """An exported graph, which computes each row by itself and without its padding.

    The scale of an int8 activation is taken over a whole tensor: what else is in a batch would change a text's embedding.
    So `threads` rows are computed side by side, each by one thread: that is faster than one row by several, which wait for each
    other at every matrix. 0 is for the cores that this process may use.

    Raises UnsupportedModel where the file cannot be run here.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what is less than fatal is raised
        with _translated(path):
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self.dimension = len(self._embed(np.zeros(1, np.int64)))
        self._pool = ThreadPoolExecutor(threads or cores(), "collegium-encoder")
        # A server replaces its router while it runs: the threads go with the graph, after what they are at.
        weakref.finalize(self, self._pool.shutdown, wait=False)

    def __call__(self, ids: Ints, mask: Ints) -> Floats:
        """As `Forward` says; raises UnsupportedModel where the graph cannot take so many tokens."""
        rows = [row[:tokens] for row, tokens in zip(ids, mask.sum(axis=1), strict=True)]
        with _translated("the encoder"):
            side_by_side = map if len(rows) == 1 else self._pool.map
            return np.stack(list(side_by_side(self._embed, rows)))

    def _embed(self, ids: Ints) -> Floats:
        """One row of token ids [t] to its embedding [d]."""
        vector: Floats = self._session.run(None, {"ids": ids[None]})[0][0]
        return vector


@contextmanager
def _translated(what: Path | str) -> Iterator[None]:
    """ONNX Runtime's errors have no root of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as raised

    kinds = (raised.Fail, raised.InvalidArgument, raised.InvalidGraph, raised.InvalidProtobuf, raised.NoSuchFile)
    try:
        yield
    except (*kinds, raised.NotImplemented, raised.RuntimeException) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(
            f"ONNX Runtime cannot run {what}: {reason}",
            hint="Remove the file, or set encoder_precision to float32.",
        ) from error


def quantized(model: CachedModel, adapter: Path | None = None) -> Path:
    """The file of the encoder in int8, with the adapter merged; takes seconds the first time, then finds it.

    Raises UnsupportedModel where there is none because the model cannot be exported or int8 moves its embeddings too far,
    which is remembered as well; ArtifactCorrupt where the adapter does not fit, OSError where the cache cannot be written.
    """
    from filelock import FileLock

    folder = _cache()
    key = _key(model, adapter)
    ready, refused = folder / f"{key}.onnx", folder / f"{key}.refused"
    if not _used(ready):
        with FileLock(folder / f"{key}.lock"):
            if not _used(ready) and not refused.exists():  # another process may have made it while we waited
                _make(model, adapter, folder / f".partial-{key}", ready, refused)
                _make_room(ready)
    if not ready.exists():
        raise UnsupportedModel(
            refused.read_text("utf-8"), hint=f"Set encoder_precision to float32, or remove {refused} to try again."
        )
    return ready


def _cache() -> Path:
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("collegium")) / "encoders"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _used(path: Path) -> bool:
    """Whether the file is there; if so, it counts as used now."""
    with suppress(OSError):  # not there, or in a cache that this process may only read
        os.utime(path)
    return path.exists()


def _make_room(made: Path) -> None:
    """Delete all graphs but `made` and those used last."""
    from filelock import FileLock, Timeout

    def when(path: Path) -> tuple[bool, float]:
        with suppress(FileNotFoundError):
            return path == made, path.stat().st_mtime
        return False, 0.0

    for path in sorted(made.parent.glob("*.onnx"), key=when, reverse=True)[KEPT:]:
        lock = path.with_suffix(".lock")
        # Another process may use the file, which Windows does not let us delete then, or delete it as well.
        with suppress(FileNotFoundError, PermissionError, Timeout), FileLock(lock).acquire(timeout=0):
            path.unlink(missing_ok=True)
            lock.unlink()


def _key(model: CachedModel, adapter: Path | None) -> str:
    """Names what the graph is made of, and with what. A model's identity leaves its configuration out."""
    parts = [encoder_identity(model, adapter), sha256(model.folder / "config.json"), pools_cls(model.folder)]
    return digest([*parts, *map(version, ("onnxruntime", "torch", "transformers")), FORMAT])[:32]


def _make(model: CachedModel, adapter: Path | None, partial: Path, ready: Path, refused: Path) -> None:
    from .export import export_int8

    shutil.rmtree(partial, ignore_errors=True)  # we hold the lock: what is here was left by a process that died
    partial.mkdir()
    try:
        try:
            made, final = export_int8(model, adapter, partial), ready
        except UnsupportedModel as error:
            made, final = partial / "refused", refused
            made.write_text(error.message, "utf-8")
        with made.open("rb+") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        made.replace(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
