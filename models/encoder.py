"""Text to embeddings, for the router and for retrieval: a BERT encoder with sentence-transformers' pooling.

Reads a sentence-transformers folder (`1_Pooling/config.json`, `sentence_bert_config.json`) without that package, whose
import would be added to every start; a test holds both to the same vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import ArtifactCorrupt, UnsupportedModel
from ..schema import digest
from .cache import CachedModel, sha256
from .windows import Windows, read_json

if TYPE_CHECKING:
    from torch import Tensor

Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Forward(Protocol):
    """From token ids to embeddings. Called by several threads at once."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    def __call__(self, ids: Ints, mask: Ints) -> Floats:
        """Embeddings [n, dimension] of length one, from [n, t]; `mask` is 1 for tokens, 0 for the padding after them."""


class Encoder:
    """Sentence embeddings, L2-normalised (Reimers and Gurevych, Sentence-BERT, 2019).

    A text is read up to `window` tokens, special ones included; by default, up to the model's own limit. With several
    `windows`, a longer text is read in that many, and its embedding is the mean of theirs, weighted by their tokens.
    Without `forward`, torch computes on the CPU. `identity` is the model's own where none is given.
    """

    def __init__(
        self,
        model: CachedModel,
        forward: Forward | None = None,
        *,
        identity: str | None = None,
        window: int | None = None,
        windows: int = 1,
        batch_size: int = 32,
    ) -> None:
        self.identity = identity or model.identity
        self._windows = Windows(model.folder, window, windows)
        self._forward = forward or TorchForward(model)
        self._batch_size = batch_size

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self._forward.dimension

    def encode(self, texts: Sequence[str]) -> Floats:
        """Embeddings [len(texts), dimension]. Windows are batched by length, so that padding costs little."""
        windows = [(place, ids) for place, text in enumerate(texts) for ids in self._windows(text)]
        windows.sort(key=lambda window: len(window[1]))
        sums = np.zeros((len(texts), self.dimension), np.float32)
        for start in range(0, len(windows), self._batch_size):
            batch = windows[start : start + self._batch_size]
            ids, mask = self._pad([ids for _, ids in batch])
            weights = mask.sum(axis=1, keepdims=True, dtype=np.float32)
            np.add.at(sums, [place for place, _ in batch], self._forward(ids, mask) * weights)
        sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return sums

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
        ids = np.full((len(rows), max(map(len, rows))), self._windows.padding, np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask


class TorchForward:
    """The encoder on torch in float32, an adapter merged into it: the reference, and what a GPU runs."""

    def __init__(self, model: CachedModel, adapter: Path | None = None, *, device: str = "cpu") -> None:
        self._model = pooled(model, adapter).to(device)
        self._device = device
        self.dimension = int(self._model.encoder.config.hidden_size)

    def __call__(self, ids: Ints, mask: Ints) -> Floats:
        """As the protocol says."""
        import torch

        with torch.inference_mode():
            inputs = (torch.from_numpy(array).to(self._device) for array in (ids, mask))
            vectors: Floats = self._model(*inputs).cpu().numpy()
        return vectors


def pooled(model: CachedModel, adapter: Path | None = None, *, attention: str | None = None) -> Any:
    """The encoder with its adapter merged, as a module from ids and mask [n, t] to pooled, normalised vectors [n, dimension].

    `attention` is transformers' name of an implementation. Raises UnsupportedModel where the folder asks for a pooling that
    is not supported, ArtifactCorrupt where the adapter does not fit.
    """
    import torch
    from transformers import AutoModel

    first_only = pools_cls(model.folder)
    # By default the checkpoint's own type is taken, which may be one of 16 bits.
    encoder = AutoModel.from_pretrained(model.folder, dtype=torch.float32, attn_implementation=attention)
    merged = _merge(encoder, adapter, model.name) if adapter else encoder

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = merged

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            states: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(-1)
            mean = states[:, 0] if first_only else (states * weights).sum(1) / weights.sum(1)
            return torch.nn.functional.normalize(mean, dim=1)

    return Pooled().eval()  # a module is born in training mode, and a wrapper would carry that back into what it wraps


def _merge(encoder: Any, adapter: Path, name: str) -> Any:
    """LoRA (Hu et al., 2021): W + scaling B A, computed once."""
    from peft import PeftModel
    from safetensors import SafetensorError

    _read_adapter(adapter)
    try:
        return PeftModel.from_pretrained(encoder, str(adapter)).merge_and_unload()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise _corrupt(adapter, f"does not fit {name}: {error}") from error


def encoder_identity(model: CachedModel, adapter: Path | None) -> str:
    """Names the embeddings: the model, and the adapter's content. Raises ArtifactCorrupt where that is no adapter."""
    if adapter is None:
        return model.identity
    # The path of the base model is that of the machine that trained it.
    config = {key: value for key, value in _read_adapter(adapter).items() if key != "base_model_name_or_path"}
    return f"{model.identity}+{digest([config, sha256(adapter / WEIGHTS)])[:16]}"


def _read_adapter(folder: Path) -> dict[str, Any]:
    """An adapter's configuration; its weights are there, and safetensors: PEFT would take pickled ones too."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise _corrupt(folder, f"has no {name}")
    try:
        return read_json(folder / CONFIG)
    except (ValueError, TypeError) as error:
        raise _corrupt(folder, f"cannot be read: {error}") from None


def _corrupt(adapter: Path, what: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(f"The encoder's adapter in {adapter} {what}.", hint="Roll back to an earlier release.")


def pools_cls(folder: Path) -> bool:
    """Whether the folder asks for CLS pooling; mean is the default, anything else is refused by name."""
    pooling = read_json(folder / "1_Pooling" / "config.json")
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
