"""The Llama family in float32 or bfloat16 on torch, with a paged key-value cache and stacked adapters.

The order of operations and the types in between are those of transformers, so that answers are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UnsupportedModel
from .batch import PAGE, Batch, Floats
from .plan import Group, Plan, make_plan
from .shape import Shape, read_shape
from .stack import LoraStack, Route, zeros
from .weights import Weights

if TYPE_CHECKING:
    import torch

    from .lora import LoraWeights


@dataclass(frozen=True, slots=True)
class _Linear:
    """One linear or several that share their input."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    lora: LoraStack

    def __call__(self, x: torch.Tensor, route: Route | None) -> torch.Tensor:
        from torch.nn.functional import linear

        y = linear(x, self.weight, self.bias)
        if route:
            self.lora.add(x, y, route)
        return y


@dataclass(frozen=True, slots=True)
class _Layer:
    before: torch.Tensor
    """[hidden] the norm before attention."""
    after: torch.Tensor
    """[hidden] the norm after it."""
    heads: torch.Tensor | None
    """[heads + kv_heads, head_dim] the norm of queries and keys (Qwen3)."""
    qkv: _Linear
    o: _Linear
    gate_up: _Linear
    down: _Linear
    keys: torch.Tensor
    """[pages, PAGE, kv_heads, head_dim], and so the values."""
    values: torch.Tensor


class DenseDecoder:
    """A Decoder on torch. `pages` and `slots` are how many there are; slot 0, no adapter, is one more.

    Raises UnsupportedModel where the folder holds no model that it can run.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype, pages: int, slots: int) -> None:
        import torch

        self._shape = shape = read_shape(folder)
        self._device, self._dtype = device, dtype
        self.pages, self.slots = pages, slots
        self._inv_freq = torch.from_numpy(shape.inv_freq).to(device)
        with Weights(folder) as weights:
            embedding, head = weights.embedding(tied=shape.tied), weights.head(tied=shape.tied)
            self._embedding = self._put(embedding, (shape.vocab, shape.hidden))
            self._head = (
                self._embedding if head.data_ptr() == embedding.data_ptr() else self._put(head, embedding.shape)
            )
            self._norm = self._put(weights["model.norm.weight"], (shape.hidden,))
            self._layers = [self._read_layer(weights, layer, pages) for layer in range(shape.layers)]

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        return self._shape

    @property
    def precision(self) -> str:
        """`float32` or `bfloat16`."""
        return str(self._dtype).removeprefix("torch.")

    @property
    def page_bytes(self) -> int:
        """Bytes of the key-value cache that one page takes, all layers together."""
        return self._shape.cached_values * PAGE * self._dtype.itemsize

    def load(self, slot: int, lora: LoraWeights) -> None:
        """Put an adapter into a slot (from 1), in place of what was there. Raises ArtifactCorrupt where it does not fit."""
        lora.check(self._shape)
        for layer in self._layers:
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                linear.lora.load(slot, lora)

    def close(self) -> None:
        """Nothing: torch frees its memory."""

    def forward(self, batch: Batch) -> Floats:
        """Logits `[W, vocab]`; the keys and values of every token are written into its sequence's pages."""
        import torch
        from torch.nn import functional

        with torch.inference_mode():
            plan = make_plan(batch, shape=self._shape, inv_freq=self._inv_freq, dtype=self._dtype)
            x = functional.embedding(plan.tokens, self._embedding)
            for layer in self._layers:
                x = x + self._attend(layer, self._rms(x, layer.before), plan)
                gate, up = layer.gate_up(self._rms(x, layer.after), plan.route).chunk(2, 1)
                x = x + layer.down(functional.silu(gate) * up, plan.route)
            x = self._rms(x[plan.wanted], self._norm)
            logits: Floats = functional.linear(x, self._head).float().cpu().numpy()
            return logits

    def _attend(self, layer: _Layer, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        import torch

        shape = self._shape
        qkv = layer.qkv(x, plan.route).view(len(x), -1, shape.head_dim)
        qk, v = qkv[:, : -shape.kv_heads], qkv[:, -shape.kv_heads :]
        if layer.heads is not None:
            qk = self._rms(qk, layer.heads)
        left, right = qk.chunk(2, 2)
        qk = qk * plan.cos + torch.cat((-right, left), 2) * plan.sin
        # Finite, for a page is handed on: what no query may see is multiplied by 0, which leaves NaN what it is.
        layer.keys.flatten(0, 1).index_copy_(0, plan.places, qk[:, shape.heads :].nan_to_num())
        layer.values.flatten(0, 1).index_copy_(0, plan.places, v.nan_to_num())
        out = torch.empty_like(qk[:, : shape.heads])
        for group in plan.groups:
            out[group.where] = self._attend_together(layer, qk[group.where, : shape.heads], group)
        return layer.o(out.flatten(1), plan.route)

    def _attend_together(self, layer: _Layer, q: torch.Tensor, group: Group) -> torch.Tensor:
        """Queries [S * T, heads, head_dim]. Those that share a key head stand below each other, as if they were more tokens.

        So no key is repeated, and the fast kernels take the mask.
        """
        from torch.nn.functional import scaled_dot_product_attention

        count, kv_heads = len(group.pages), self._shape.kv_heads
        q = q.view(count, len(q) // count, kv_heads, -1, self._shape.head_dim).permute(0, 2, 3, 1, 4)
        keys, values = (cache[group.pages].flatten(1, 2).transpose(1, 2) for cache in (layer.keys, layer.values))
        out = scaled_dot_product_attention(q.flatten(2, 3), keys, values, group.visible)
        return out.view(q.shape).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """In float32 up to the weight, as transformers does."""
        import torch

        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._shape.norm_eps)
        return weight * wide.to(self._dtype)

    def _put(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if tensor.shape != shape:
            raise UnsupportedModel(
                f"A tensor of the model is {tuple(tensor.shape)}, its config.json means {shape}.",
                hint="Fetch the model again.",
            )
        return tensor.to(self._device, self._dtype, copy=True)  # a view would keep the whole file in memory

    def _read_layer(self, weights: Weights, layer: int, pages: int) -> _Layer:
        import torch

        shape, prefix = self._shape, f"model.layers.{layer}"
        heads = None
        if shape.qk_norm:
            norms = [weights[f"{prefix}.self_attn.{name}_norm.weight"] for name in "qk"]
            heads = torch.cat([norms[0].expand(shape.heads, -1), norms[1].expand(shape.kv_heads, -1)])
            heads = self._put(heads, (shape.heads + shape.kv_heads, shape.head_dim))
        cache = (pages, PAGE, shape.kv_heads, shape.head_dim)
        keys, values = (zeros(cache, self._dtype, self._device) for _ in range(2))
        return _Layer(
            self._put(weights[f"{prefix}.input_layernorm.weight"], (shape.hidden,)),
            self._put(weights[f"{prefix}.post_attention_layernorm.weight"], (shape.hidden,)),
            heads,
            self._read_linear(weights, layer, "q_proj", "k_proj", "v_proj"),
            self._read_linear(weights, layer, "o_proj"),
            self._read_linear(weights, layer, "gate_proj", "up_proj"),
            self._read_linear(weights, layer, "down_proj"),
            keys,
            values,
        )

    def _read_linear(self, weights: Weights, layer: int, *names: str) -> _Linear:
        outs = {name: self._shape.linears[name][0] for name in names}
        width = self._shape.linears[names[0]][1]
        weight, bias = weights.linear(layer, *names)
        placed = self._put(weight, (sum(outs.values()), width))
        lora = LoraStack(layer, outs, width, slots=self.slots, device=self._device)
        return _Linear(placed, None if bias is None else self._put(bias, (len(placed),)), lora)
