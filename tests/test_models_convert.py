"""GGUF becomes a transformers folder: the same model, once, whoever is killed on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from collegium.errors import UnsupportedModel
from collegium.models.cache import ModelCache
from collegium.models.convert import convert_gguf

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

NAME = "pypi:tiny-gguf==1.0/tiny_gguf/tiny.gguf"
CHILD = """
import sys
from pathlib import Path
from collegium.models.cache import ModelCache

def tell(what, done, total):
    print(what, flush=True)
    if sys.argv[3] == "stall" and what.startswith("Converting"):
        sys.stdin.read()

print(ModelCache(Path(sys.argv[1])).get(sys.argv[2], tell).identity, flush=True)
"""


@pytest.fixture(scope="module")
def tiny_gguf(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model as a GGUF file, with SmolLM's name for its pre-tokenizer."""
    from gguf import GGUFWriter
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    config = model.config
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    body = json.loads((tiny_base / "tokenizer.json").read_text("utf-8"))["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(body["vocab"], key=body["vocab"].__getitem__))
    writer.add_token_types([3 if token in tokenizer.all_special_ids else 1 for token in range(len(tokenizer))])
    writer.add_token_merges([" ".join(pair) for pair in body["merges"]])
    for name in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_token_id"))
    writer.add_chat_template(tokenizer.chat_template)
    for name, weight in model.state_dict().items():
        writer.add_tensor(*_as_gguf(name, weight, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_gguf(name: str, weight: Tensor, config: Any) -> tuple[str, NDArray[np.float32]]:
    """A tensor under the name, and in the order of rows, that llama.cpp gives it."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    array: NDArray[np.float32] = weight.contiguous().numpy()
    return str(names.get_name(name, try_suffixes=[".weight"])), array


def test_the_converted_model_is_the_one_that_was_written(tiny_gguf: Path, tiny_base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    convert_gguf(tiny_gguf, tmp_path / "ready")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "ready")
    original = AutoModelForCausalLM.from_pretrained(tiny_base)
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        np.testing.assert_allclose(converted(ids).logits, original(ids).logits, atol=1e-4)
    assert converted.dtype == torch.float32


def test_the_converted_tokenizer_speaks_the_same_and_splits_digits(
    tiny_gguf: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    convert_gguf(tiny_gguf, tmp_path / "ready")
    converted, original = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "ready", tiny_base))
    for text in ("the inner theatre", " über\n\tdas 日本", "<|im_start|>user\n", "a  b   c"):
        assert converted.encode(text) == original.encode(text)
    assert converted.chat_template == original.chat_template
    assert converted.eos_token_id == original.eos_token_id
    split = converted.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1999")
    assert [piece for piece, _ in split][-4:] == list("1999")


def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(UnsupportedModel, match=r"model\.gguf cannot be read"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "ready")


def test_a_file_that_is_cut_is_refused_by_name(tiny_gguf: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_gguf, tmp_path / "model.gguf")
    with (tmp_path / "model.gguf").open("r+b") as file:
        file.truncate(tiny_gguf.stat().st_size // 2)
    with pytest.raises(UnsupportedModel, match=r"model\.gguf cannot be read"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "ready")


@pytest.fixture
def tiny_wheel(make_wheel: Callable[[str, Mapping[str, bytes]], Path], tiny_gguf: Path) -> Path:
    return make_wheel("tiny-gguf", {"tiny_gguf/tiny.gguf": tiny_gguf.read_bytes()})


def child(root: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), NAME, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.usefixtures("tiny_wheel")
def test_a_process_that_is_killed_leaves_nothing_that_others_see(tmp_path: Path) -> None:
    root = tmp_path / "models"
    with child(root, "stall") as process:
        assert process.stdout
        assert process.stdout.readline() == "Converting tiny.gguf\n"
        process.kill()
    assert not [path for path in root.iterdir() if not path.name.startswith(".") and path.suffix != ".lock"]
    model = ModelCache(root).get(NAME)
    assert (model.folder / "model.safetensors").exists()
    assert not list(root.glob(".partial*"))


@pytest.mark.usefixtures("tiny_wheel")
def test_two_processes_at_once_convert_once(tmp_path: Path) -> None:
    root = tmp_path / "models"
    told: list[str] = []
    with child(root, "go") as process:
        model = ModelCache(root).get(NAME, lambda what, done, total: told.append(what))
        assert process.stdout
        *theirs, identity = process.stdout.read().splitlines()
    assert [*told, *theirs].count("Converting tiny.gguf") == 1
    assert identity == model.identity
