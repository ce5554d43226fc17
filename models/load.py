"""Load a cached causal language model and its tokenizer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

from ..errors import SettingsError, UnsupportedModel
from .cache import CachedModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Precision = Literal["auto", "int8", "float32", "bfloat16"]
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


def check_architecture(name: str, architecture: str) -> None:
    """Raises UnsupportedModel for one that is not declared."""
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(f"{name} is a {architecture}.", hint=f"Supported: {', '.join(ARCHITECTURES)}.")


def load_lm(model: CachedModel, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The language model in evaluation mode; raises UnsupportedModel for an architecture that is not declared."""
    from transformers import AutoModelForCausalLM

    check_architecture(model.name, model.architecture)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=dtype)  # its `to` is mistyped
    lm: PreTrainedModel = loaded.to(device).eval()
    return lm


def pick_device(choice: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that a setting means; `auto` takes a GPU where one is. Raises SettingsError where one is wanted in vain."""
    import torch

    if choice == "cpu" or not torch.cuda.is_available():
        if choice == "cuda":
            raise SettingsError("There is no GPU that torch can use.", hint="Set device to cpu or auto.")
        return torch.device("cpu")
    return torch.device("cuda")


def pick_dtype(choice: Precision, device: torch.device) -> torch.dtype:
    """The type of torch's weights that a setting means; torch has none for int8, which is as `auto` here.

    bfloat16 halves the bytes that every token moves, but on a CPU without instructions for it torch is slower with it.
    """
    import torch

    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if choice in ("bfloat16", "float32"):
        return torch.bfloat16 if choice == "bfloat16" else torch.float32
    return torch.bfloat16 if native else torch.float32


def limit_threads(threads: int) -> None:
    """Give torch `threads` threads, 0 for the cores that this process may use; more than the cores collapses its speed."""
    import torch

    torch.set_num_threads(threads or cores())


def cores() -> int:
    """The cores that this process may use; all of the machine's where the system does not tell (macOS, Windows)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
