"""What a decoder's config.json says, as far as the engine computes it; the rest is refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedModel
from ...models.load import check_architecture

if TYPE_CHECKING:
    from .batch import Floats

STEADY_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on how long a sequence is."""
WHOLE_HEAD, CAPS = "partial_rotary_factor", ("attn_logit_softcapping", "final_logit_softcapping")


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder of the Llama family."""

    architecture: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    """Tokens in a sequence at most: not more than the sliding window where there is one, within which attention is full."""
    norm_eps: float
    qk_norm: bool
    """Queries and keys are normalised a head (Qwen3)."""
    tied: bool
    """The head is the embedding, unless the checkpoint has another."""
    inv_freq: Floats = field(repr=False, compare=False)
    """[head_dim / 2] radians a position."""
    rope_scale: float = 1.0
    """What cosines and sines are multiplied with (YaRN)."""

    @property
    def cached_values(self) -> int:
        """Keys and values that the cache holds of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the matrices of a layer, by the names that checkpoints and adapters use."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (query, self.hidden),
            "k_proj": (key, self.hidden),
            "v_proj": (key, self.hidden),
            "o_proj": (self.hidden, query),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }


def read_shape(folder: Path) -> Shape:
    """Read the config.json of a transformers folder. Raises UnsupportedModel, naming what the engine cannot do."""
    architecture = _check_kind(folder)
    config = _read_config(folder)
    _refuse_unsupported(folder, config)
    inv_freq, rope_scale = _rope(folder, config)
    return Shape(
        architecture=architecture,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        context=min(config.max_position_embeddings, _window(config) or config.max_position_embeddings),
        norm_eps=config.rms_norm_eps,
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied=bool(config.tie_word_embeddings),
        inv_freq=inv_freq,
        rope_scale=rope_scale,
    )


def _check_kind(folder: Path) -> str:
    """The architecture, checked before transformers reads a configuration that it may not know."""
    try:
        body = json.loads((folder / "config.json").read_text("utf-8"))
        architecture = str(body["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):
        raise UnsupportedModel(
            f"{folder} has no config.json that names an architecture.", hint="Name a transformers model folder."
        ) from None
    check_architecture(str(folder), architecture)
    if body.get("quantization_config"):
        raise _unsupported(folder, "quantization_config", hint="Name the model's unquantized weights.")
    return architecture


def _read_config(folder: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise UnsupportedModel(
            f"{folder / 'config.json'} cannot be read: {error}", hint="Name a transformers model folder."
        ) from error


def _refuse_unsupported(folder: Path, config: Any) -> None:
    if config.hidden_act != "silu":
        raise _unsupported(folder, f"hidden_act {config.hidden_act}", hint="Supported: silu.")
    whole = (getattr(config, WHOLE_HEAD, None) or 1.0, config.rope_parameters.get(WHOLE_HEAD, 1.0))
    if whole != (1.0, 1.0):
        raise _unsupported(folder, WHOLE_HEAD, hint="Supported: rotary embeddings over whole heads.")
    for name in CAPS:
        if getattr(config, name, None):
            raise _unsupported(folder, name, hint="Supported: logits without a cap.")
    for kind in _layer_types(config):
        if kind not in ("full_attention", "sliding_attention"):
            raise _unsupported(folder, f"the layer type {kind}", hint="Supported: full and sliding attention.")


def _unsupported(folder: Path, what: str, *, hint: str) -> UnsupportedModel:
    return UnsupportedModel(f"{folder} uses {what}, which is not supported.", hint=hint)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _layer_types(config: Any) -> list[str]:
    """Llama and Mistral do not read `layer_types`, so for them it says nothing."""
    return list(config.layer_types) if config.model_type in ("qwen2", "qwen3") else []


def _window(config: Any) -> int | None:
    """The sliding window, where a layer has one."""
    slides = config.model_type == "mistral" or "sliding_attention" in _layer_types(config)
    window: int | None = config.sliding_window if slides else None
    return window


def _rope(folder: Path, config: Any) -> tuple[Floats, float]:
    """Frequencies [head_dim / 2] and the scale of cosines and sines, as the model's own rotary module has them."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters: dict[str, Any] = config.rope_parameters
    kind = parameters["rope_type"]
    if kind not in STEADY_ROPES:
        raise _unsupported(folder, f"the rope type {kind}", hint=f"Supported: {', '.join(STEADY_ROPES)}.")
    if kind == "default":
        dim = _head_dim(config)
        frequencies: Any = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
        return frequencies.numpy(), 1.0
    try:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config)
    except (KeyError, TypeError, ValueError) as error:
        raise _unsupported(folder, f"the rope type {kind} without {error}", hint="Complete its config.json.") from None
    return frequencies.numpy(), float(scale)
