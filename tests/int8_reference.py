"""What the int8 decoder should compute: the modules of transformers and PEFT, their linears quantised as it quantises them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collegium.experts.engine.batch import Floats

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 64


def quantised_reference(base: Path, adapter: Path | None = None) -> Callable[[Sequence[int]], Floats]:
    """A function from tokens to their logits [T, vocab].

    Sums are made in float64, so the decoder differs by the rounding of float32 alone, and where that turns a value that
    lies half-way between two steps.
    """
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("bfloat16_cache", _attend)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="bfloat16_cache")
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    embedding = model.get_input_embeddings()
    embedding.forward = lambda tokens: embedding.weight[tokens].bfloat16().float()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, b in module.lora_B.items():
                b.weight.data *= module.scaling[name]
                module.scaling[name] = 1.0
        if isinstance(module, torch.nn.Linear):
            _quantise_linear(module)

    def logits(tokens: Sequence[int]) -> Floats:
        with torch.inference_mode():
            found: Floats = model.eval()(torch.tensor([list(tokens)]), use_cache=False).logits[0].numpy()
            return found

    return logits


def quantise(values: Tensor, *, weights: bool) -> Tensor:
    """The float64 values that int8 stands for, with a scale for every 64 of the last dimension.

    The scale of weights is a bfloat16, rounded up.
    """
    import torch

    parts = []
    for part in torch.split(values, GROUP, -1):
        most = part.abs().amax(-1, keepdim=True)
        scale = most / 127.0
        if weights:
            scale = ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
        inverse = torch.where(most > 0, 1 / scale if weights else 127.0 / most, 0)
        parts.append((part * inverse).round().double() * scale.double())
    return torch.cat(parts, -1)


def _quantise_linear(linear: Any) -> None:
    from torch.nn.functional import linear as product

    weight = quantise(linear.weight.detach(), weights=True)
    bias = None if linear.bias is None else linear.bias.detach().double()
    linear.forward = lambda x: product(quantise(x, weights=False), weight, bias).float()


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    key, value = key.bfloat16().float(), value.bfloat16().float()
    return sdpa_attention_forward(module, query, key, value, None, **options)
