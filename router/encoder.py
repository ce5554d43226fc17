"""The router's own encoders: the base model with a router's adapter merged. Retrieval keeps the original."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import UnsupportedModel
from ..models.encoder import Encoder, encoder_identity
from .spelling import Forgiving, Spelling, TextEncoder

if TYPE_CHECKING:
    from ..models.cache import CachedModel
    from ..models.encoder import Forward

log = logging.getLogger(__name__)

WINDOW, WINDOWS = 128, 4
"""A prompt is read in up to so many windows of so many tokens: a domain shows in any part of it, and attention over all of a long
prompt at once costs more."""
Precision = Literal["auto", "int8", "float32"]


class Encoders:
    """One encoder of each adapter, shared by all routers of the process.

    `precision` auto is int8 through ONNX Runtime where there is no GPU, and torch's float32 where there is one or int8 is not
    possible. int8 stays on the CPU whatever `device` is.
    `threads` is 0 for the cores that this process may use.
    """

    def __init__(
        self,
        model: CachedModel,
        *,
        precision: Precision = "auto",
        threads: int = 0,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ) -> None:
        self._model = model
        self._precision = precision
        self._threads = threads
        self._device = device
        self._made: dict[str, Encoder] = {}
        self._lock = threading.Lock()

    def identity(self, adapter: Path | None) -> str:
        """What the encoder with this adapter is named by. Raises ArtifactCorrupt where the folder is no adapter."""
        return encoder_identity(self._model, adapter)

    def get(self, adapter: Path | None, words: Collection[str] = ()) -> TextEncoder:
        """The encoder with the adapter of a PEFT folder, or without one; the first of an adapter takes seconds.

        It reads mistyped prompts twice (spelling.py) where its vocabulary is of whole words; `words` are no errors.

        Raises ArtifactCorrupt where the adapter does not fit, UnsupportedModel where int8 is asked for and not possible,
        SettingsError where a GPU is asked for in vain.
        """
        identity = self.identity(adapter)
        with self._lock:
            if identity not in self._made:
                forward = self._forward(adapter)
                self._made[identity] = Encoder(self._model, forward, identity=identity, window=WINDOW, windows=WINDOWS)
        spelling = Spelling.of(self._model.folder, words)
        return Forgiving(self._made[identity], spelling) if spelling else self._made[identity]

    def _forward(self, adapter: Path | None) -> Forward:
        from ..models.encoder import TorchForward
        from ..models.load import pick_device

        device = pick_device(self._device).type
        if self._precision == "int8" or (self._precision == "auto" and device == "cpu"):
            try:
                return self._int8(adapter)
            except (UnsupportedModel, OSError, ImportError) as error:
                if self._precision == "int8":
                    raise
                log.warning("The router's encoder runs in float32: %s", error)
        return TorchForward(self._model, adapter, device=device)

    def _int8(self, adapter: Path | None) -> Forward:
        from ..models.onnx import OnnxForward, quantized

        return OnnxForward(quantized(self._model, adapter), self._threads)
