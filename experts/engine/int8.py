"""The decoder on int8 weights: loads a model and its adapters for the passes of int8.c."""

from __future__ import annotations

import ctypes
import weakref
from ctypes import byref, c_int, c_int32, c_void_p
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ArtifactCorrupt, UnsupportedModel
from .batch import PAGE, Batch, Floats
from .kernels import (
    ALIGNMENT,
    LINEARS,
    MAX_RANK,
    PARTS,
    VECTOR,
    CLayer,
    CLinear,
    CLoraLinear,
    CModel,
    Memory,
    load_kernels,
    round_up,
    too_large,
    whole_tiles,
)
from .lora import LoraWeights
from .shape import Shape, read_shape
from .weights import EMBEDDING, HEAD, Weights

if TYPE_CHECKING:
    from torch import Tensor

BFLOAT16_INFINITY = 0x7F80
FETCH = "Fetch the model again."
SLICE = 4096
"""Rows of a matrix that are converted at a time, in whole tiles."""
ATTENTION, NET = "self_attn", "mlp"
FUSED = (
    (ATTENTION, ("q_proj", "k_proj", "v_proj")),
    (ATTENTION, ("o_proj",)),
    (NET, ("gate_proj", "up_proj")),
    (NET, ("down_proj",)),
)
"""The linears of a layer; those that share an input are computed together."""
MODULES = tuple(name for _, names in FUSED for name in names)


class Int8Decoder:
    """A model of the Llama family on the CPU, its weights in int8 and its key-value cache in bfloat16.

    Weights and activations have a scale for every 64 inputs: with one scale for a whole row of activations, the few
    large columns that such models have would cost most of the others their digits.
    """

    def __init__(self, folder: Path, *, pages: int, slots: int, most_tokens: int, threads: int) -> None:
        """Raises UnsupportedModel, or ModelUnavailable where there is no C compiler or too little memory."""
        self.shape = _checked(read_shape(folder), folder)
        self.precision, self.pages, self.slots = "int8", pages, slots
        self._lib = load_kernels()
        self._kept: list[Any] = []  # what C points to
        self._memory = Memory(self._model_bytes() + pages * self.page_bytes)
        self._adapters = (c_void_p * (slots + 1))()
        self._adapter_memory: dict[int, tuple[Any, ...]] = {}
        self._model = CModel(pages=pages, most_tokens=most_tokens, slots=slots, adapters=self._adapters)
        with Weights(folder) as weights:
            self._load_model(weights)
        self._model.cache = self._memory.take(pages * self.page_bytes)
        self._model.pool = self._lib.pool_new(threads)
        self._step = self._lib.step_new(byref(self._model)) if self._model.pool else None
        self._end = weakref.finalize(self, _end, self._lib, self._step, self._model.pool)
        self._end.atexit = False  # a pass may still be running then
        if not self._step:
            raise too_large()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page's keys and values, all layers together."""
        dims = self.shape.head_dim + round_up(self.shape.head_dim, VECTOR)
        return self.shape.layers * self.shape.kv_heads * dims * PAGE * 2

    def forward(self, batch: Batch) -> Floats:
        """Logits `[W, vocab]` of a batch of at most `most_tokens` tokens, as many of them wanted at most.

        Raises ValueError where the batch does not fit the model, or the decoder is closed.
        """
        logits = np.empty((len(batch.wanted), whole_tiles(self.shape.vocab)), np.float32)
        arrays = [np.ascontiguousarray(one, np.int32) for one in (batch.tokens, batch.positions, batch.sequence)]
        pages, slots, wanted = (np.ascontiguousarray(one, np.int32) for one in (batch.pages, batch.slots, batch.wanted))
        if not self._end.alive or not self._lib.step_forward(
            self._step,
            *(one.ctypes.data for one in arrays),
            len(batch.tokens),
            *(pages.ctypes.data, *pages.shape),
            *(slots.ctypes.data, wanted.ctypes.data, len(wanted), logits.ctypes.data),
        ):
            raise ValueError("the batch does not fit the decoder")
        return logits[:, : self.shape.vocab]

    def load(self, slot: int, lora: LoraWeights) -> None:
        """Put an adapter into a slot. Raises ArtifactCorrupt where it does not fit, UnsupportedModel by its rank.

        What was in the slot stays there where it raises.
        """
        lora.check(self.shape)
        if lora.rank > MAX_RANK:
            raise UnsupportedModel(f"{lora.version} is of rank {lora.rank}.", hint=f"Supported: up to {MAX_RANK}.")
        count = self.shape.layers * len(MODULES)
        a, b, ranks = (c_void_p * count)(), (c_void_p * count)(), (c_int32 * count)()
        for (layer, name), (left, right) in lora.modules.items():
            at = layer * len(MODULES) + MODULES.index(name)
            a[at], b[at], ranks[at] = left.data_ptr(), right.data_ptr(), left.shape[0]
        linears = (CLoraLinear * (self.shape.layers * LINEARS))()
        size = self._lib.lora_pack(byref(self._model), None, linears, a, b, ranks)
        memory = Memory(size)
        if self._lib.lora_pack(byref(self._model), memory.take(size), linears, a, b, ranks) != size:
            raise _not_finite(lora)
        self._adapters[slot] = ctypes.addressof(linears)
        self._adapter_memory[slot] = (memory, linears)

    def close(self) -> None:
        """End the threads and free the workspace."""
        self._end()

    def _load_model(self, weights: Weights) -> None:
        shape, model = self.shape, self._model
        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab"):
            setattr(model, name, getattr(shape, name))
        model.eps = shape.norm_eps
        model.context = min(shape.context, self.pages * PAGE)  # more has no room in the cache
        angles = np.arange(model.context, dtype=np.float32)[:, None] * shape.inv_freq
        model.cosines, model.sines = (self._keep(f(angles) * np.float32(shape.rope_scale)) for f in (np.cos, np.sin))
        model.embeddings = self._embeddings(weights)
        model.last_norm = self._vector(weights, "model.norm.weight", shape.hidden)
        model.head = CLinear(shape.hidden, 1, (c_int * PARTS)(shape.vocab))
        model.head.weights[0] = self._pack(HEAD, weights.head(tied=shape.tied), (shape.vocab, shape.hidden))
        layers = (CLayer * shape.layers)()
        for number in range(shape.layers):
            self._load_layer(layers[number], weights, f"model.layers.{number}.")
        self._kept.append(layers)
        model.layer = layers

    def _load_layer(self, layer: CLayer, weights: Weights, prefix: str) -> None:
        for number, name in enumerate(("input_layernorm", "post_attention_layernorm")):
            layer.norms[number] = self._vector(weights, f"{prefix}{name}.weight", self.shape.hidden)
        if self.shape.qk_norm:
            for number, name in enumerate(("q_norm", "k_norm")):
                path = f"{prefix}{ATTENTION}.{name}.weight"
                layer.head_norms[number] = self._vector(weights, path, self.shape.head_dim)
        for number, (block, names) in enumerate(FUSED):
            layer.linears[number] = self._linear(weights, f"{prefix}{block}.", names)

    def _linear(self, weights: Weights, prefix: str, names: tuple[str, ...]) -> CLinear:
        """Quantise matrices that share an input, with their biases where one has any."""
        outs, inputs = [self.shape.linears[name][0] for name in names], self.shape.linears[names[0]][1]
        linear = CLinear(inputs, len(names), (c_int * PARTS)(*outs))
        for part, name in enumerate(names):
            path = f"{prefix}{name}.weight"
            linear.weights[part] = self._pack(path, weights[path], self.shape.linears[name])
        biases = [f"{prefix}{name}.bias" for name in names]
        if any(name in weights for name in biases):
            padded = [np.zeros(whole_tiles(out), np.float32) for out in outs]
            for row, name, out in zip(padded, biases, outs, strict=True):
                if name in weights:
                    row[:out] = _as_vector(weights[name], name, out)
            linear.bias = self._keep(np.concatenate(padded))
        return linear

    def _pack(self, name: str, weight: Tensor, sizes: tuple[int, int]) -> int:
        """Quantise a matrix `[out, in]`; returns where it is."""
        _check_sizes(weight, name, sizes)
        out, inputs = sizes
        address = self._memory.take(self._lib.matrix_bytes(out, inputs))
        starts = list(range(0, out, SLICE))
        if len(starts) > 1 and out - starts[-1] <= VECTOR:
            starts.pop()  # so few rows would be a matrix of narrow tiles
        for start, end in pairwise([*starts, out]):
            plain = weight[start:end].float().contiguous()
            to = address + self._lib.matrix_bytes(start, inputs)
            if not self._lib.matrix_pack(to, plain.data_ptr(), end - start, inputs):
                raise _damaged(name)
        return address

    def _embeddings(self, weights: Weights) -> int:
        import torch

        tensor = weights.embedding(tied=self.shape.tied)
        _check_sizes(tensor, EMBEDDING, (self.shape.vocab, self.shape.hidden))
        halves: np.ndarray[Any, Any] = tensor.to(torch.bfloat16).view(torch.int16).numpy()
        if (np.bitwise_and(halves, BFLOAT16_INFINITY) == BFLOAT16_INFINITY).any():
            raise _damaged(EMBEDDING)
        return self._keep(halves)

    def _vector(self, weights: Weights, name: str, size: int) -> int:
        return self._keep(_as_vector(weights[name], name, size))

    def _keep(self, array: np.ndarray[Any, Any]) -> int:
        array = np.ascontiguousarray(array)
        self._kept.append(array)
        return array.ctypes.data

    def _model_bytes(self) -> int:
        matrices = [*list(self.shape.linears.values()) * self.shape.layers, (self.shape.vocab, self.shape.hidden)]
        return sum(int(self._lib.matrix_bytes(*sizes)) + ALIGNMENT for sizes in matrices)


def _checked(shape: Shape, folder: Path) -> Shape:
    """What int8.c takes for granted."""
    whole = shape.layers > 0 and shape.heads % shape.kv_heads == 0 and 2 * len(shape.inv_freq) == shape.head_dim
    if not whole:
        raise UnsupportedModel(f"The sizes in {folder / 'config.json'} do not fit each other.", hint=FETCH)
    return shape


def _check_sizes(tensor: Tensor, name: str, sizes: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != sizes:
        raise UnsupportedModel(f"{name} is {tuple(tensor.shape)}, the model's config.json means {sizes}.", hint=FETCH)


def _as_vector(tensor: Tensor, name: str, size: int) -> Floats:
    _check_sizes(tensor, name, (size,))
    vector: Floats = tensor.float().numpy().copy()  # not a view of a file
    if not np.isfinite(vector).all():
        raise _damaged(name)
    return vector


def _damaged(name: str) -> UnsupportedModel:
    return UnsupportedModel(f"{name} of the model holds a number that is not finite.", hint=FETCH)


def _not_finite(lora: LoraWeights) -> ArtifactCorrupt:
    layer, name = next(
        place for place, pair in lora.modules.items() if not all(bool(one.isfinite().all()) for one in pair)
    )
    return ArtifactCorrupt(
        f"layers.{layer}.{name} of the adapter {lora.version} holds a number that is not finite.",
        hint="Register it again from its source.",
    )


def _end(lib: ctypes.CDLL, step: int | None, pool: int | None) -> None:
    lib.step_free(step)
    lib.pool_free(pool)
