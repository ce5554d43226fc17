"""Many adapters on one linear: every row of a batch goes through its own.

The gathered batched products of Punica (Chen et al. 2023) and S-LoRA (Sheng et al. 2023): with the matrices of all adapters
stacked, `y_i += B[slot_i] A[slot_i] x_i` is two batched products, whichever adapters the rows use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from .batch import Batch
    from .lora import LoraWeights


FEW_RUNS = 2
"""Up to here, one after the other is not more kernels than gathering."""


@dataclass(frozen=True, slots=True)
class Route:
    """Which adapter each token goes through. The first tokens go through none."""

    first: int
    runs: tuple[tuple[int, int, int], ...]
    """(begin, end, slot) of neighbours with the same adapter."""
    slots: torch.Tensor | None = None
    """[T - first], where the matrices are gathered for each token; None where runs go one after the other."""


def route(batch: Batch, device: torch.device) -> Route | None:
    """None where no token goes through an adapter.

    A GPU waits for kernels, so one token of each of many sequences is gathered for. A CPU waits for memory, and what is
    gathered is copied.
    """
    import torch

    slots = batch.slots[batch.sequence]
    first = int(np.searchsorted(slots, 1))
    if first == len(slots):
        return None
    edges = [first, *(np.flatnonzero(slots[first + 1 :] != slots[first:-1]) + first + 1).tolist(), len(slots)]
    runs = tuple((begin, end, int(slots[begin])) for begin, end in pairwise(edges))
    if device.type == "cpu" or len(runs) <= FEW_RUNS or len(slots) > len(batch.slots):
        return Route(first, runs)
    return Route(first, runs, torch.from_numpy(slots[first:]).to(device))


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that, on a CPU, take no memory until they are written: torch's own are written at once.

    Raises MemoryError, or torch's OutOfMemoryError.
    """
    import torch

    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(*shape)


def _widened(matrices: torch.Tensor, rank: int) -> torch.Tensor:
    """[slots + 1, _, rank, ...] with zeros for what was not there."""
    slots, outs, before, *rest = matrices.shape
    wider = zeros((slots, outs, rank, *rest), matrices.dtype, matrices.device)
    if before:
        wider[:, :, :before] = matrices
    return wider


class LoraStack:
    """A and B of all slots for linears that share their input; slot 0 stays zero. `outs` are the sizes of their outputs.

    The rank of the stack is the largest that was ever loaded; smaller adapters are filled up with zeros. All is float32,
    as PEFT has it: beside a bfloat16 model, the sum is rounded once.
    """

    def __init__(self, layer: int, outs: Mapping[str, int], width: int, *, slots: int, device: torch.device) -> None:
        import torch

        self._layer, self._names = layer, tuple(outs)
        self._a = torch.zeros(slots + 1, len(outs), 0, width, device=device)
        self._b = [torch.zeros(slots + 1, out, 0, device=device) for out in outs.values()]
        ends = np.cumsum([0, *outs.values()]).tolist()
        self._places = [slice(begin, end) for begin, end in pairwise(ends)]

    def load(self, slot: int, lora: LoraWeights) -> None:
        """Put the adapter's matrices for these linears into a slot; those that it leaves alone become zero."""
        if lora.rank > self._a.shape[2]:
            self._a = _widened(self._a, lora.rank)
            self._b = [_widened(b, lora.rank) for b in self._b]
        self._a[slot] = 0
        for part, name in enumerate(self._names):
            self._b[part][slot] = 0
            if (self._layer, name) in lora.modules:
                a, b = lora.modules[self._layer, name]
                self._a[slot, part, : len(a)] = a
                self._b[part][slot, :, : len(a)] = b

    def add(self, x: torch.Tensor, y: torch.Tensor, route: Route) -> None:
        """Add to the outputs `y` [T, out] what each row's adapter makes of the inputs `x` [T, in]."""
        import torch

        x = x.float()
        if route.slots is None:
            for begin, end, slot in route.runs:
                low = x[begin:end] @ self._a[slot].flatten(0, 1).T
                for place, b, part in zip(self._places, self._b, low.chunk(len(self._b), 1), strict=True):
                    y[begin:end, place] += part @ b[slot].T
            return
        low = torch.bmm(self._a[route.slots].flatten(1, 2), x[route.first :, :, None])
        for place, b, part in zip(self._places, self._b, low.chunk(len(self._b), 1), strict=True):
            y[route.first :, place] += torch.bmm(b[route.slots], part).squeeze(2)
