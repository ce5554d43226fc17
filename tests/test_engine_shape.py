"""What the engine reads of a model folder, and what it refuses by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collegium.errors import UnsupportedModel
from collegium.experts.engine.shape import read_shape
from collegium.experts.engine.weights import EMBEDDING, HEAD, Weights
from collegium.tests.engine_models import VOCAB, tiny_lm

UP = "model.layers.0.mlp.up_proj.weight"
SLIDING: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "yarn by its own factor": {"factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 0.7},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm(tmp_path_factory.mktemp("llama"))


def configured(folder: Path, base: Path, **changes: Any) -> Path:
    """A folder with the configuration of `base`, changed."""
    config = json.loads((base / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), "utf-8")
    return folder


def test_sizes_are_read(tmp_path: Path) -> None:
    shape = read_shape(tiny_lm(tmp_path, "Qwen3ForCausalLM", head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-5))
    assert (shape.architecture, shape.vocab, shape.hidden, shape.intermediate) == ("Qwen3ForCausalLM", VOCAB, 32, 48)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (2, 4, 2, 16)
    assert (shape.context, shape.norm_eps, shape.qk_norm, shape.tied) == (512, 1e-5, True, True)
    assert (shape.inv_freq.dtype.name, shape.inv_freq.shape, shape.rope_scale) == ("float32", (8,), 1.0)
    assert shape.linears["q_proj"] == (64, 32)
    with Weights(tmp_path) as weights:
        for name, size in shape.linears.items():
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            assert tuple(weights[f"model.layers.1.{part}.{name}.weight"].shape) == size


QWEN2: dict[str, Any] = {
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
QWEN2 |= {"rope_theta": 1e6, "sliding_window": 32768, "max_window_layers": 21, "use_sliding_window": False}
LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
LLAMA: dict[str, Any] = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
LLAMA |= {"head_dim": 64, "rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}}
MISTRAL: dict[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
MISTRAL |= {"rope_theta": 1e4, "sliding_window": 4096}


@pytest.mark.parametrize(
    ("model_type", "architecture", "config", "head_dim", "context", "lowest"),
    [
        ("qwen2", "Qwen2ForCausalLM", QWEN2, 64, 32768, 1e6 ** (-62 / 64)),
        ("llama", "LlamaForCausalLM", LLAMA, 64, 131072, 5e5 ** (-62 / 64) / 32),
        ("mistral", "MistralForCausalLM", MISTRAL, 128, 4096, 1e4 ** (-126 / 128)),
        (
            "llama",
            "LlamaForCausalLM",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            128,
            2048,
            1e4 ** (-126 / 128) / 2,
        ),
    ],
)
def test_configurations_as_older_releases_wrote_them(
    model_type: str,
    architecture: str,
    config: dict[str, Any],
    head_dim: int,
    context: int,
    lowest: float,
    tmp_path: Path,
) -> None:
    """As the hub has them: frequencies in fields of their own, no size of a head."""
    body = {"model_type": model_type, "architectures": [architecture], "torch_dtype": "bfloat16"} | config
    (tmp_path / "config.json").write_text(json.dumps(body), "utf-8")
    shape = read_shape(tmp_path)
    assert (shape.head_dim, shape.context) == (head_dim, context)
    assert shape.inv_freq[-1] == pytest.approx(lowest, rel=1e-5)


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_are_those_of_the_model(rope: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    parameters = {"rope_theta": 10_000.0, "rope_type": rope.split(maxsplit=1)[0]} | ROPES[rope]
    folder = tiny_lm(tmp_path, rope_parameters=parameters)
    rotary: Any = LlamaForCausalLM.from_pretrained(folder).model.rotary_emb
    shape = read_shape(folder)
    np.testing.assert_array_equal(shape.inv_freq, rotary.inv_freq.numpy())
    assert shape.rope_scale == rotary.attention_scaling


@pytest.mark.parametrize(
    ("architecture", "changes", "context"),
    [
        ("LlamaForCausalLM", {"sliding_window": 64}, 512),  # Llama does not read it
        ("MistralForCausalLM", {"sliding_window": None}, 512),
        ("MistralForCausalLM", {"sliding_window": 64}, 64),
        ("MistralForCausalLM", {"sliding_window": 4096}, 512),
        ("Qwen2ForCausalLM", {"sliding_window": 64}, 512),
        ("Qwen2ForCausalLM", SLIDING | {"max_window_layers": 2}, 512),
        ("Qwen2ForCausalLM", SLIDING | {"max_window_layers": 1}, 64),
        ("Qwen3ForCausalLM", SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}, 64),
        ("Qwen3ForCausalLM", SLIDING | {"layer_types": ["full_attention", "full_attention"]}, 512),
    ],
)
def test_the_context_ends_with_a_window_that_is_used(
    architecture: str, changes: dict[str, Any], context: int, tmp_path: Path
) -> None:
    assert read_shape(tiny_lm(tmp_path, architecture, **changes)).context == context


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "no config.json that names an architecture"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "the rope type dynamic"),
        (
            {
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}
                | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
            },
            "the rope type longrope",
        ),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_scaling": {"rope_type": "mrope", "mrope_section": [2, 1, 1]}, "rope_parameters": None}, "mrope"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "nothing"}, "nothing"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    changes: dict[str, Any], named: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=named) as caught:
        read_shape(configured(tmp_path, llama, **changes))
    assert caught.value.hint


@pytest.mark.parametrize("content", [None, "{", "[]", "null"])
def test_a_folder_without_a_configuration_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, "utf-8")
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        read_shape(tmp_path)


def sharded(folder: Path, base: Path) -> Path:
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(base)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def test_shards_are_read_as_one(llama: Path, tmp_path: Path) -> None:
    import torch

    folder = sharded(tmp_path, llama)
    assert len(list(folder.glob("*.safetensors"))) > 1
    with Weights(folder) as weights, Weights(llama) as single:
        for name in (UP, EMBEDDING, HEAD, "model.norm.weight"):
            assert torch.equal(weights[name], single[name])


def test_a_tensor_outlives_its_file(llama: Path) -> None:
    with Weights(llama) as weights:
        tensor = weights[UP]
    assert tuple(tensor.shape) == (48, 32)
    assert float(tensor.abs().sum()) > 0


def test_a_missing_tensor_is_named(llama: Path) -> None:
    with Weights(llama) as weights:
        assert UP in weights
        assert "model.layers.9.mlp.up_proj.weight" not in weights
        with pytest.raises(UnsupportedModel, match=r"no tensor model\.layers\.9\.mlp\.up_proj\.weight") as caught:
            weights["model.layers.9.mlp.up_proj.weight"]
    assert caught.value.hint


def rewrite(folder: Path, **changes: Any) -> None:
    """Put tensors into the checkpoint; None takes one out."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def test_the_head_is_what_the_checkpoint_holds(tmp_path: Path) -> None:
    """As in transformers, whatever the configuration says of it."""
    import torch

    folder = tiny_lm(tmp_path, tie_word_embeddings=True)
    with Weights(folder) as weights:
        assert HEAD not in weights
        embedding = weights[EMBEDDING].clone()
        assert weights.head(tied=True).data_ptr() == weights.embedding(tied=True).data_ptr()
        with pytest.raises(UnsupportedModel, match=HEAD):
            weights.head(tied=False)
    rewrite(folder, **{HEAD: embedding.clone()})
    with Weights(folder) as weights:
        assert weights.head(tied=True).data_ptr() == weights.embedding(tied=True).data_ptr()
    rewrite(folder, **{HEAD: embedding + 1})
    with Weights(folder) as weights:
        assert torch.equal(weights.head(tied=True), embedding + 1)
    rewrite(folder, **{EMBEDDING: None})
    with Weights(folder) as weights:
        assert torch.equal(weights.embedding(tied=True), embedding + 1)
        with pytest.raises(UnsupportedModel, match=EMBEDDING):
            weights.embedding(tied=False)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, r"no model\.safetensors"),
        ({"pytorch_model.bin": b"pickle"}, r"no model\.safetensors"),
        ({"model.safetensors": b"not safetensors"}, r"model\.safetensors cannot be read"),
        ({"model.safetensors.index.json": b"{"}, r"index\.json cannot be read"),
        ({"model.safetensors.index.json": b"[]"}, r"index\.json cannot be read"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "b.safetensors"}}'}, r"b\.safetensors cannot be read"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../b.safetensors"}}'}, r"names \.\./b"),
    ],
)
def test_a_folder_without_a_checkpoint_is_refused(files: dict[str, bytes], named: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsupportedModel, match=named) as caught:
        Weights(tmp_path)
    assert caught.value.hint
