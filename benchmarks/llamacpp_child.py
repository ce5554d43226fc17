"""Runs in the interpreter that has llama-cpp-python, and needs nothing else: llamacpp.py talks to it.

    python llamacpp_child.py BASE.gguf FOLDER THREADS LORA.gguf ...

First it prints the kinds of weights that it has; then, for each request on a line of standard input, the seconds that it took.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp

KINDS = {"as shipped": None, "Q8_0": 7, "Q4_0": 2}
"""Name -> the number that llama.cpp gives it; None is the file as it is."""
CONTEXT = 2048


class Model:
    """A model with adapters in memory, of which one at a time is on."""

    def __init__(self, path: Path, loras: list[str], threads: int) -> None:
        self._llama: Any = llama_cpp.Llama(
            str(path), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._loras = [llama_cpp.llama_adapter_lora_init(self._llama.model, lora.encode()) for lora in loras]
        assert all(self._loras)

    def answer(self, prompt: list[int], lora: int, tokens: int) -> list[int]:
        """Greedy tokens; the end token is like any other."""
        adapter = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._loras[lora])
        failed = llama_cpp.llama_set_adapters_lora(self._llama.ctx, adapter, 1, (ctypes.c_float * 1)(1.0))
        assert not failed
        self._llama.reset()  # or it would reuse what another adapter has read
        answer = self._llama.generate(prompt, temp=0.0)
        return [next(answer) for _ in range(tokens)]


def quantise(source: Path, target: Path, kind: int, threads: int) -> None:
    """Requantise `source` as another kind."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.allow_requantize = kind, threads, True
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
    assert not failed


def main() -> None:
    base, folder, threads, *loras = sys.argv[1:]
    models = {}
    for name, kind in KINDS.items():
        path = Path(base)
        if kind is not None:
            path = Path(folder) / f"{name}.gguf"
            quantise(Path(base), path, kind, int(threads))
        models[name] = Model(path, loras, int(threads))
    print(json.dumps(list(models)), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        model = models[request["kind"]]
        start = time.perf_counter()
        answers = [model.answer(prompt, lora, request["tokens"]) for lora, prompt in enumerate(request["prompts"])]
        seconds = time.perf_counter() - start
        assert all(len(answer) == request["tokens"] for answer in answers)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
