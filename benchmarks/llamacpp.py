"""llama.cpp on the engine's work, by way of llama-cpp-python, which is no dependency: any interpreter may have it.

Its Python interface has one adapter a context, so requests for different adapters run one after another.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from workload import NEW_TOKENS, AdapterFolder, rank_and_alpha

from collegium.experts.adapters import TARGET
from collegium.models.fetch import fetch
from collegium.models.names import parse_name

CHILD = Path(__file__).parent / "llamacpp_child.py"
LLAMA_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


class LlamaCpp:
    """llama.cpp through llama-cpp-python in an interpreter of its own: one request after another, an adapter each."""

    def __init__(
        self,
        python: str,
        gguf: Path,
        adapters: Sequence[AdapterFolder],
        workspace: Path,
        threads: int,
        heads: tuple[int, int],
    ) -> None:
        loras = [workspace / f"{adapter.name}.gguf" for adapter in adapters]
        for adapter, path in zip(adapters, loras, strict=True):
            write_lora(adapter, path, heads)
        command = [python, str(CHILD), str(gguf), str(workspace), str(threads), *map(str, loras)]
        self._child = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.kinds: list[str] = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._child.communicate()

    def one_by_one(self, kind: str, prompts: Sequence[Sequence[int]]) -> float:
        """Tokens/s with the weights quantised as `kind`; the n-th prompt is for the n-th adapter."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"kind": kind, "prompts": prompts, "tokens": NEW_TOKENS}) + "\n")
        self._child.stdin.flush()
        return float(len(prompts) * NEW_TOKENS / self._read())

    def _read(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self._child.args)} failed; run it by hand to see why.")  # type: ignore[arg-type]
        return json.loads(line)


def fetch_gguf(name: str, workspace: Path) -> Path:
    """The GGUF file that the base model `name` was converted from."""
    folder = workspace / "gguf"
    folder.mkdir()
    fetch(parse_name(name), folder, timeout=60)
    return next(folder.rglob("*.gguf"))


def has_llama_cpp(python: str) -> bool:
    """Whether that interpreter has llama-cpp-python."""
    found = shutil.which(python)
    asked = [found or python, "-c", "import llama_cpp"]
    return found is not None and not subprocess.run(asked, capture_output=True, check=False).returncode  # noqa: S603


def write_lora(adapter: AdapterFolder, path: Path, heads: tuple[int, int]) -> None:
    """The adapter as GGUF, as llama.cpp's `convert_lora_to_gguf.py` writes it; `heads` are those of queries and of keys.

    llama.cpp turns pairs of neighbouring dimensions where transformers turns halves, so the rows of q and k change places.
    """
    from gguf import GGUFWriter
    from safetensors.torch import load_file

    _, alpha = rank_and_alpha(adapter)
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for key, tensor in load_file(adapter.weights).items():
        found = TARGET.fullmatch(key)
        assert found is not None, key
        matrix = tensor.float()
        name, half = found["name"], found["half"]
        if half == "B" and name in ("q_proj", "k_proj"):
            count = heads[name == "k_proj"]
            matrix = matrix.reshape(count, 2, -1, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)
        target = f"blk.{found['layer']}.{LLAMA_NAMES[name]}.weight.lora_{half.lower()}"
        writer.add_tensor(target, matrix.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
