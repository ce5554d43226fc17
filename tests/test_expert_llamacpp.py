"""llama.cpp with an exported adapter gives what transformers and PEFT give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from collegium.errors import ModelUnavailable
from collegium.experts.engine.batch import Floats
from collegium.experts.lora_gguf import write_lora_gguf
from collegium.models.cache import ModelCache
from collegium.models.chat import ChatEncoder
from collegium.models.fetch import fetch
from collegium.models.load import load_tokenizer
from collegium.models.names import parse_name
from collegium.schema import Message
from collegium.settings import DEFAULT_BASE
from collegium.tests.engine_models import reference
from collegium.tests.test_models_convert import tiny_gguf  # noqa: F401

pytestmark = pytest.mark.slow
PYTHON = os.environ.get("COLLEGIUM_LLAMACPP_PYTHON", sys.executable)  # before the tests' environment is cleared
ASK = """
import json, sys
import numpy as np
from llama_cpp import Llama

model, lora, tokens, target = sys.argv[1:]
rows = json.loads(tokens)
llama = Llama(model, lora_path=lora or None, n_ctx=512, logits_all=True, n_threads=1, verbose=False)
found = []
for row in rows:
    llama.reset()
    llama.eval(row)
    found.append(np.array(llama.scores[: len(row)], np.float32))
np.savez(target, *found)
"""
QUESTIONS = ("What is a tort?", "Why is the sky blue?")


def llama(model: Path, lora: Path | None, rows: Sequence[Sequence[int]], folder: Path) -> list[Floats]:
    """Log-probabilities [T, vocab] of each row. Skips the test where the interpreter has no llama-cpp-python."""
    if subprocess.run([PYTHON, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        pytest.skip(f"{PYTHON} has no llama-cpp-python; COLLEGIUM_LLAMACPP_PYTHON names one that has")
    target = folder / "logits.npz"
    command = [PYTHON, "-c", ASK, str(model), str(lora or ""), json.dumps(rows), str(target)]
    subprocess.run(command, check=True, capture_output=True)
    with np.load(target) as found:
        return [logprobs(found[name]) for name in found.files]


def logprobs(logits: Floats) -> Floats:
    found: Floats = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=1, keepdims=True).astype(np.float32)
    return found


def off(one: Sequence[Floats], other: Sequence[Floats]) -> float:
    return float(np.mean([np.abs(a - b).mean() for a, b in zip(one, other, strict=True)]))


def test_a_tiny_float32_model_with_an_adapter_is_the_same(
    tiny_gguf: Path,  # noqa: F811
    tiny_base: Path,
    adapters: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    rows = [[5, 6, 7, 8, 9, 40, 41], list(range(3, 60))]
    write_lora_gguf(adapters["law"], tiny_base, tmp_path / "law.gguf", name="law", alpha=8)
    ours = reference(tiny_base, adapters["law"])
    plain = reference(tiny_base)
    tuned = [logprobs(ours(row)) for row in rows]
    assert off(llama(tiny_gguf, tmp_path / "law.gguf", rows, tmp_path), tuned) < 0.01
    assert off(llama(tiny_gguf, None, rows, tmp_path), [logprobs(plain(row)) for row in rows]) < 0.01
    assert off(tuned, [logprobs(plain(row)) for row in rows]) > 0.5


@pytest.mark.models
def test_a_shipped_adapter_is_as_near_as_the_base_model_is(real_home: Path, tmp_path: Path) -> None:
    model = ModelCache(real_home / "models").get(DEFAULT_BASE)
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    try:
        fetch(parse_name(DEFAULT_BASE), gguf, timeout=60)
    except ModelUnavailable as error:
        pytest.skip(str(error))
    shipped = Path(__file__).parent.parent / "shipped"
    spec = json.loads((shipped / "cards" / "law.json").read_text("utf-8"))["spec"]
    adapter = shipped / "artifacts" / spec["adapter"]
    alpha = json.loads((adapter / "adapter_config.json").read_text("utf-8"))["lora_alpha"]
    write_lora_gguf(adapter, model.folder, tmp_path / "law.gguf", name="law", alpha=alpha)
    chat = ChatEncoder(load_tokenizer(model))
    rows = [chat.encode([Message("user", question)]) for question in QUESTIONS]
    tuned, plain = (
        [logprobs(ask(row)) for row in rows] for ask in (reference(model.folder, adapter), reference(model.folder))
    )
    base = next(gguf.glob("*.gguf"))
    noise = off(llama(base, None, rows, tmp_path), plain)  # 4-bit weights times 8-bit activations beside float32
    with_it = llama(base, tmp_path / "law.gguf", rows, tmp_path)
    assert off(with_it, tuned) < 1.5 * noise < 0.3 * off(tuned, plain)
