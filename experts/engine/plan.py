"""What every layer needs to know of a batch, worked out once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .batch import PAGE, Batch
from .shape import Shape
from .stack import Route, route

if TYPE_CHECKING:
    import torch

AnyInts = npt.NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Group:
    """S sequences with as many tokens each (T) that attend together."""

    where: torch.Tensor | slice
    """Their S * T places in the batch."""
    pages: torch.Tensor
    """[S, most]."""
    visible: torch.Tensor
    """[S, 1, heads a key head * T, most * PAGE] which keys each query sees."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A batch of T tokens on the device of the model."""

    tokens: torch.Tensor
    wanted: torch.Tensor
    cos: torch.Tensor
    """[T, 1, head_dim], and so `sin`."""
    sin: torch.Tensor
    places: torch.Tensor
    """[T] where in the cache each token's key and value go."""
    groups: list[Group]
    route: Route | None


def make_plan(batch: Batch, *, shape: Shape, inv_freq: torch.Tensor, dtype: torch.dtype) -> Plan:
    """`inv_freq` is the shape's, on the device of the model; `dtype` is the model's."""
    device = inv_freq.device
    angles = _ints(batch.positions, device)[:, None].float() * inv_freq
    cos, sin = ((wave.repeat(1, 2) * shape.rope_scale).to(dtype)[:, None] for wave in (angles.cos(), angles.sin()))
    page = batch.pages[batch.sequence, batch.positions // PAGE]
    return Plan(
        tokens=_ints(batch.tokens, device),
        wanted=_ints(batch.wanted, device),
        cos=cos,
        sin=sin,
        places=_ints(page * PAGE + batch.positions % PAGE, device),
        groups=_group_all(batch, shape.heads // shape.kv_heads, device),
        route=route(batch, device),
    )


def _group_all(batch: Batch, repeats: int, device: torch.device) -> list[Group]:
    """Sequences with one token together, those with several one by one."""
    counts = np.bincount(batch.sequence, minlength=len(batch.slots))
    ends = np.cumsum(counts)
    singles = np.flatnonzero(counts == 1)
    if len(singles) == len(batch.tokens):
        return [_group(batch, slice(None), singles, repeats, device)]
    groups = [
        _group(batch, slice(ends[row] - counts[row], ends[row]), np.array([row]), repeats, device)
        for row in np.flatnonzero(counts > 1)
    ]
    return groups if not len(singles) else [*groups, _group(batch, ends[singles] - 1, singles, repeats, device)]


def _group(batch: Batch, where: AnyInts | slice, rows: AnyInts, repeats: int, device: torch.device) -> Group:
    """`rows` of the batch whose tokens are at `where`; `repeats` queries share a key head."""
    import torch

    positions = batch.positions[where].reshape(len(rows), -1)
    most = int(positions.max()) // PAGE + 1
    visible = torch.arange(most * PAGE, device=device) <= _ints(positions, device)[:, :, None]
    place = where if isinstance(where, slice) else _ints(where, device)
    return Group(place, _ints(batch.pages[rows, :most], device), visible.repeat(1, repeats, 1)[:, None])


def _ints(numbers: AnyInts, device: torch.device) -> torch.Tensor:
    import torch

    return torch.from_numpy(numbers).to(device, torch.int64)
