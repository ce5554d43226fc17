"""A PEFT folder is read as PEFT would apply it; what does not fit is named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import collegium
from collegium.errors import ArtifactCorrupt, UnsupportedModel
from collegium.experts.adapters import CONFIG, WEIGHTS
from collegium.experts.engine.lora import LoraWeights, read_lora
from collegium.experts.engine.shape import read_shape
from collegium.tests.engine_models import tiny_lm, tiny_lora

if TYPE_CHECKING:
    from torch import Tensor

Q = "base_model.model.model.layers.0.self_attn.q_proj"
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MakeLora = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm(tmp_path_factory.mktemp("base"))


@pytest.fixture
def make(base: Path, tmp_path: Path) -> MakeLora:
    return lambda **config: tiny_lora(tmp_path / "lora", base, **config)


def deltas_of_peft(folder: Path, base: Path) -> dict[tuple[int, str], Tensor]:
    """scaling * B A of every module that PEFT adapts."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            parts = path.split(".")
            found[int(parts[parts.index("layers") + 1]), parts[-1]] = module.get_delta_weight("default").detach()
    return found


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("config", "rank"),
    [
        ({"r": 4, "lora_alpha": 8}, 4),
        ({"r": 3, "lora_alpha": 5, "use_rslora": True}, 3),
        ({"r": 4, "target_modules": ["q_proj", "down_proj"]}, 4),
        ({"r": 4, "target_modules": r".*layers\.1\..*_proj"}, 4),
        ({"r": 4, "target_modules": ["v_proj"], "layers_to_transform": [1]}, 4),
        ({"r": 4, "exclude_modules": ["o_proj"]}, 4),
        ({"r": 4, "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2}, "lora_alpha": 3}, 7),
        ({"r": 4, "alpha_pattern": {r"layers\.0\..*": 9, "^model.layers.1.mlp.up_proj": 1, "proj": 77}}, 4),
        ({"r": 4, "rank_pattern": {".*k_proj": 6}, "alpha_pattern": {"k_proj": 2}, "use_rslora": True}, 6),
        ({"r": 4, "rank_pattern": {"self_attn": 6}, "alpha_pattern": {"mlp": 2, "proj": 3}}, 4),  # match no whole end
        ({"r": 4, "init_lora_weights": "orthogonal"}, 4),
    ],
)
def test_it_is_what_peft_applies(config: dict[str, Any], rank: int, dtype: str, make: MakeLora, base: Path) -> None:
    import torch

    folder = make(dtype=dtype, **config)
    lora = read_lora(folder, "law@1")
    expected = deltas_of_peft(folder, base)
    assert (lora.version, lora.rank) == ("law@1", rank)
    assert lora.modules.keys() == expected.keys()
    for key, (a, b) in lora.modules.items():
        assert a.dtype == b.dtype == torch.float32
        assert a.is_contiguous()
        assert b.is_contiguous()
        torch.testing.assert_close(b @ a, expected[key], rtol=1e-5, atol=1e-5)
    lora.check(read_shape(base))


def test_types_may_be_mixed(make: MakeLora) -> None:
    """Also where a tensor does not begin at a multiple of its width, as some writers leave it."""
    import torch

    folder = make()
    first = read_lora(folder, "law@1")
    layout: dict[str, Any] = {}
    data = b""
    tensors = tensors_of(folder)
    for at, (key, tensor) in enumerate(tensors.items()):
        kind, body = ("F32", tensor.numpy().tobytes()) if at % 3 else ("F16", tensor.half().numpy().tobytes())
        data += b"\0" * (at % 3)
        layout[key] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(body)]}
        data += body
    header = json.dumps(layout).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data)
    for module, pair in read_lora(folder, "law@1").modules.items():
        for found, expected in zip(pair, first.modules[module], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_file_is_not_changed_and_reading_again_is_the_same(make: MakeLora) -> None:
    import torch

    folder = make(lora_alpha=8)
    before = (folder / WEIGHTS).read_bytes()
    first, second = read_lora(folder, "a"), read_lora(folder, "a")
    assert (folder / WEIGHTS).read_bytes() == before
    assert all(torch.equal(b, second.modules[key][1]) for key, (_, b) in first.modules.items())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)


def reweigh(folder: Path, key: str, tensor: Tensor | None) -> None:
    """Put a tensor into the adapter; None takes it out."""
    from safetensors.torch import save_file

    tensors = {name: one for name, one in tensors_of(folder).items() if name != key}
    save_file(tensors if tensor is None else tensors | {key: tensor}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("key", "shape", "named"),
    [
        (f"{Q}.lora_B.weight", None, r"layers\.0\.q_proj .* no A and B"),
        (f"{Q}.lora_A.weight", None, r"layers\.0\.q_proj .* no A and B"),
        (f"{Q}.lora_A.weight", (2, 32), r"layers\.0\.q_proj .* no A and B of one rank"),
        (f"{Q}.lora_B.weight", (32, 2), r"q_proj\.lora_B\.weight .* is of rank 2, not 4"),
        (f"{Q}.lora_A.weight", (128,), r"q_proj\.lora_A\.weight .* is not a matrix"),
        (f"{Q}.lora_B.bias", (32,), r"lora_B\.bias"),
        (f"{Q}.lora_magnitude_vector", (32,), "lora_magnitude_vector"),
        ("base_model.model.lm_head.lora_A.weight", (4, 32), r"lm_head\.lora_A\.weight"),
        ("base_model.model.model.layers.0.input_layernorm.weight", (32,), "input_layernorm"),
    ],
)
def test_what_does_not_fit_is_named(key: str, shape: tuple[int, ...] | None, named: str, make: MakeLora) -> None:
    import torch

    folder = make()
    reweigh(folder, key, torch.ones(shape) if shape else None)
    with pytest.raises(ArtifactCorrupt, match=named) as caught:
        read_lora(folder, "law@1")
    assert "law@1" in caught.value.message
    assert caught.value.hint


def test_other_types_are_refused(make: MakeLora) -> None:
    import torch

    folder = make()
    reweigh(folder, f"{Q}.lora_A.weight", torch.ones(4, 32, dtype=torch.int32))
    with pytest.raises(ArtifactCorrupt, match=r"q_proj\.lora_A\.weight .* BF16, F16, F32"):
        read_lora(folder, "law@1")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("content", [None, b"", b"\xff" * 7, b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"[]"])
def test_a_file_that_is_none_is_named(name: str, content: bytes | None, make: MakeLora) -> None:
    folder = make()
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ArtifactCorrupt, match=name):
        read_lora(folder, "law@1")


def test_a_cut_file_is_named(make: MakeLora) -> None:
    folder = make()
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-64])
    with pytest.raises(ArtifactCorrupt, match="lora_"):
        read_lora(folder, "law@1")


def test_what_is_not_plain_lora_is_refused(make: MakeLora) -> None:
    folder = make()
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | {"use_dora": True}), "utf-8")
    with pytest.raises(UnsupportedModel, match="use_dora"):
        read_lora(folder, "law@1")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 1}, r"layers\.1\."),
        ({"hidden_size": 64}, r"layers\.0\."),
        ({"head_dim": 16}, r"layers\.0\.\w_proj"),
    ],
)
def test_another_models_adapter_is_named(changes: dict[str, Any], named: str, make: MakeLora, tmp_path: Path) -> None:
    other = read_shape(tiny_lm(tmp_path / "other", **changes))
    with pytest.raises(ArtifactCorrupt, match=named):
        read_lora(make(), "law@1").check(other)


def test_the_shipped_adapters_are_read() -> None:
    assert collegium.__file__
    folders = [path.parent for path in (Path(collegium.__file__).parent / "shipped").glob(f"artifacts/*/{WEIGHTS}")]
    assert folders
    for folder in folders:
        lora: LoraWeights = read_lora(folder, folder.name)
        layers = len(lora.modules) // len(NAMES)
        assert layers in (12, 30)  # of the small model of proxied experts, or of the base model
        assert sorted(lora.modules) == sorted((layer, name) for layer in range(layers) for name in NAMES)
        assert all(np.isfinite(b.numpy()).all() and b.abs().max() > 0 for _, b in lora.modules.values())


def test_numbers_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tiny_lm(tmp_path / "base")
    folder = tiny_lora(tmp_path / "adapter", base)
    tensors = load_file(folder / WEIGHTS)
    key = sorted(tensors)[3]
    tensors[key][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ArtifactCorrupt, match=key):
        read_lora(folder, "law@1")
