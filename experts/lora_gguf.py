"""An adapter as GGUF, the format of llama.cpp: what its convert_lora_to_gguf.py writes of a PEFT folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UnsupportedModel
from .engine.lora import read_lora
from .engine.shape import Shape, read_shape

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""llama.cpp's names."""
LINEARS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def write_lora_gguf(adapter: Path, base: Path, target: Path, *, name: str, alpha: float) -> None:
    """Write the PEFT folder `adapter` of the transformers folder `base` as the file `target`, in float32.

    llama.cpp adds (alpha / rank) B A, with one `alpha` for all modules; where PEFT scales a module otherwise, B makes up for it.
    Raises UnsupportedModel for an architecture that llama.cpp has no name for, and what `read_lora` raises.
    """
    from gguf import GGUFType, GGUFWriter, Keys, LlamaFileType

    shape = read_shape(base)
    if shape.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"A {shape.architecture} cannot be written as GGUF.", hint=f"It can be of {', '.join(ARCHITECTURES)}."
        )
    weights = read_lora(adapter, name)
    weights.check(shape)
    writer = GGUFWriter(target, ARCHITECTURES[shape.architecture])
    try:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_file_type(LlamaFileType.ALL_F32)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha or 1.0)
        for (layer, linear), (a, b) in sorted(weights.modules.items()):
            tensor = f"blk.{layer}.{LINEARS[linear]}.weight"
            writer.add_tensor(f"{tensor}.lora_a", a.numpy())
            # B holds PEFT's whole scaling: llama.cpp's own is taken out of it again.
            plain = (b * (len(a) / (alpha or 1.0))).numpy()
            writer.add_tensor(f"{tensor}.lora_b", _reordered(plain, linear, shape))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _reordered(b: npt.NDArray[np.float32], linear: str, shape: Shape) -> npt.NDArray[np.float32]:
    """B [out, r] with its rows in llama.cpp's order: its rotary embedding of the Llama family turns neighbours, not halves."""
    import numpy as np

    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(linear)
    if heads is None or ARCHITECTURES[shape.architecture] != "llama":
        return b
    halves = b.reshape(heads, 2, len(b) // heads // 2, b.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(b.shape))
