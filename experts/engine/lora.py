"""A PEFT folder as matrices that an engine stacks.

LoRA (Hu et al. 2021) adds `scaling * B A x` to a linear; the scaling is multiplied into B here, once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ...errors import ArtifactCorrupt
from ..adapters import CONFIG, TARGET, WEIGHTS, check_config

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from .batch import Floats
    from .shape import Shape

WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}
MATRIX = 2  # dimensions
Bytes: TypeAlias = "npt.NDArray[np.uint8]"
Header = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """The matrices of one adapter."""

    version: str
    rank: int
    """The largest of its modules."""
    modules: Mapping[tuple[int, str], tuple[Tensor, Tensor]] = field(repr=False)
    """By layer and linear ("q_proj"): A [r, in] and B [out, r], float32 and contiguous; B holds the scaling."""

    def check(self, shape: Shape) -> None:
        """Raises ArtifactCorrupt where a matrix does not fit a model of this shape."""
        for (layer, name), (a, b) in self.modules.items():
            if layer >= shape.layers or (b.shape[0], a.shape[1]) != shape.linears[name]:
                raise _corrupt(self.version, f"layers.{layer}.{name}", "does not fit the model")


def read_lora(folder: Path, version: str) -> LoraWeights:
    """Read an adapter; `version` is its name in errors.

    Raises ArtifactCorrupt naming the tensor that is not as it should be, UnsupportedModel where it is not plain LoRA.
    """
    config = _read_config(folder, version)
    check_config(config)
    scaling = _Scaling(config)
    halves: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, tensor in _read_tensors(folder / WEIGHTS, version).items():
        found = TARGET.fullmatch(key)
        if not found or tensor.ndim != MATRIX:
            raise _corrupt(version, key, "is not a matrix of LoRA")
        halves.setdefault((int(found["layer"]), found["name"]), {})[found["half"]] = tensor
        if found["half"] == "B":
            rank, factor = scaling.of(found["module"])
            if tensor.shape[1] != rank:
                raise _corrupt(version, key, f"is of rank {tensor.shape[1]}, not {rank}")
            tensor.mul_(factor)  # a view of a copy of the file
    return LoraWeights(version, *_pair(halves, version))


def _pair(
    halves: Mapping[tuple[int, str], Mapping[str, Tensor]], version: str
) -> tuple[int, dict[tuple[int, str], tuple[Tensor, Tensor]]]:
    """The largest rank, and A and B side by side."""
    pairs, largest = {}, 0
    for (layer, name), pair in halves.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise _corrupt(version, f"layers.{layer}.{name}", "has no A and B of one rank")
        pairs[layer, name] = pair["A"], pair["B"]
        largest = max(largest, len(pair["A"]))
    return largest, pairs


def _corrupt(version: str, key: str, what: str) -> ArtifactCorrupt:
    return ArtifactCorrupt(f"{key} of the adapter {version} {what}.", hint="Register it again from its source.")


def _read_config(folder: Path, version: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _corrupt(version, CONFIG, f"cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise _corrupt(version, CONFIG, "is not a configuration")
    return config


class _Scaling:
    """What PEFT's `LoraModel._create_and_replace` and `LoraLayer.update_layer` make of the configuration."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rank = int(config.get("r", 8))
        self._alpha = float(config.get("lora_alpha", 8))
        self._ranks: Mapping[str, float] = config.get("rank_pattern") or {}
        self._alphas: Mapping[str, float] = config.get("alpha_pattern") or {}
        self._rslora = bool(config.get("use_rslora"))

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scaling of a module ("model.layers.0.mlp.up_proj").

        `alpha / r`, or `alpha / sqrt(r)` where rank-stabilized (Kalajdzievski 2023).
        """
        rank = int(_match(self._ranks, module, self._rank))
        alpha = _match(self._alphas, module, self._alpha)
        return rank, alpha / (math.sqrt(rank) if self._rslora else rank)


def _match(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """The value of the first pattern that matches the end of the module's name, as PEFT's `get_pattern_key` has it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _read_tensors(path: Path, version: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file as float32 views.

    The whole data section is converted at once: of a small adapter, one call a tensor would take most of the time. And by
    numpy: torch would start a second pool of threads for the engine's, beside the one that embeds prompts.
    """
    import numpy as np
    import torch

    try:
        header, start = _read_header(path)
        data = np.fromfile(path, np.uint8, offset=start)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _corrupt(version, WEIGHTS, f"cannot be read: {error}") from None
    converted: dict[tuple[str, int], Floats] = {}
    suspicious: set[tuple[str, int]] = set()
    tensors = {}
    for key, entry in header.items():
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        width = WIDTHS.get(kind, 0)
        if not width or end > len(data) or (end - begin) != math.prod(shape) * width:
            raise _corrupt(version, key, f"is not a tensor of {', '.join(WIDTHS)}")
        rest = begin % width  # 0 unless a writer of the file did not align
        if (kind, rest) not in converted:
            whole = data[rest : len(data) - (len(data) - rest) % width]
            converted[kind, rest] = _as_float32(whole, kind)
            if not np.isfinite(converted[kind, rest]).all():  # perhaps just tensors of another type, read as this one
                suspicious.add((kind, rest))
        numbers = converted[kind, rest][begin // width : begin // width + math.prod(shape)]
        if (kind, rest) in suspicious and not np.isfinite(numbers).all():
            raise _corrupt(version, key, "holds numbers that are not finite")
        tensors[key] = torch.from_numpy(numbers).view(shape)
    return tensors


def _as_float32(data: Bytes, kind: str) -> Floats:
    """The numbers in `data`, of one of WIDTHS."""
    import numpy as np

    if kind == "BF16":  # the upper half of a float32
        return np.left_shift(data.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
    return data.view(np.float16 if kind == "F16" else np.float32).astype(np.float32)


def _read_header(path: Path) -> tuple[Header, int]:
    """The tensors' types, shapes and places, and where their data begin; see the safetensors format."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("it is not a safetensors file")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size
