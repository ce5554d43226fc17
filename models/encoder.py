"""Text to embeddings, for the router and for retrieval: a BERT encoder with sentence-transformers' pooling.

Reads a sentence-transformers folder (`1_Pooling/config.json`, `sentence_bert_config.json`) without that package, whose
import would be added to every start; a test holds both to the same vectors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedModel
from .cache import CachedModel


class Encoder:
    """Sentence embeddings, L2-normalised (Reimers and Gurevych, Sentence-BERT, 2019)."""

    def __init__(self, model: CachedModel, *, batch_size: int = 32) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.identity = model.identity
        self._batch_size = batch_size
        self._cls = _pools_cls(model.folder)
        self._tokenizer = AutoTokenizer.from_pretrained(model.folder)
        self._model = AutoModel.from_pretrained(model.folder).eval()
        limit = _read(model.folder / "sentence_bert_config.json").get("max_seq_length")
        self._max_tokens = limit or min(self._tokenizer.model_max_length, self._model.config.max_position_embeddings)

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self._model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings [len(texts), dimension]. Texts are batched by length, so that padding costs little."""
        out = np.zeros((len(texts), self.dimension), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            out[batch] = self._encode_batch([texts[i] for i in batch])
        return out

    def _encode_batch(self, texts: list[str]) -> NDArray[np.float32]:
        import torch

        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt")
        with torch.inference_mode():
            states = self._model(**inputs).last_hidden_state
            if self._cls:
                pooled = states[:, 0]
            else:
                mask = inputs["attention_mask"].unsqueeze(-1)
                pooled = (states * mask).sum(1) / mask.sum(1)
            vectors: NDArray[np.float32] = torch.nn.functional.normalize(pooled, dim=1).numpy()
        return vectors


def _pools_cls(folder: Path) -> bool:
    """Whether the folder asks for CLS pooling; mean is the default, anything else is refused by name."""
    pooling = _read(folder / "1_Pooling" / "config.json")
    modes = {
        key.removeprefix("pooling_mode_")
        for key, on in pooling.items()
        if key.startswith("pooling_mode_") and on is True
    }
    if named := pooling.get("pooling_mode"):  # sentence-transformers writes names as of 6.2, flags before
        names = {"mean": "mean_tokens", "cls": "cls_token"}
        modes = {names.get(mode, mode) for mode in ([named] if isinstance(named, str) else named)}
    if modes - {"mean_tokens", "cls_token"} or len(modes) > 1:
        raise UnsupportedModel(
            f"{folder} pools with {', '.join(sorted(modes))}.", hint="Supported: mean_tokens, cls_token."
        )
    return modes == {"cls_token"}


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}
