"""Load a cached causal language model and its tokenizer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UnsupportedModel
from .cache import CachedModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""The decoders that the conformance tests hold on a tiny random model each; others are refused by name."""


def load_tokenizer(model: CachedModel) -> PreTrainedTokenizerFast:
    """The tokenizer; raises UnsupportedModel where it has no chat template."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model.folder)
    if not tokenizer.chat_template:
        raise UnsupportedModel(f"{model.name} has no chat template.", hint="Use an instruction-tuned model.")
    fast: PreTrainedTokenizerFast = tokenizer
    return fast


def load_lm(model: CachedModel, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The language model in evaluation mode; raises UnsupportedModel for an architecture that is not declared."""
    from transformers import AutoModelForCausalLM

    if model.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{model.name} is a {model.architecture}.", hint=f"Supported: {', '.join(ARCHITECTURES)}."
        )
    loaded: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=dtype)  # its `to` is mistyped
    lm: PreTrainedModel = loaded.to(device).eval()
    return lm


def pick_device(choice: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that a setting means; `auto` takes a GPU where one is."""
    import torch

    if choice == "cuda" or (choice == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("cpu")


def pick_dtype(choice: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """The type of the weights that a setting means.

    bfloat16 halves the bytes that every token moves, but on a CPU without instructions for it torch is slower with it.
    """
    import torch

    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if choice == "bfloat16" or (choice == "auto" and native) else torch.float32


def limit_threads(threads: int) -> None:
    """Give torch `threads` threads, 0 for the cores that this process may use; more than the cores collapses its speed."""
    import torch

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
