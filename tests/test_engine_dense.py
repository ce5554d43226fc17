"""The torch decoder computes what transformers and PEFT compute, however its input is cut and whoever is beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.errors import ArtifactCorrupt, UnsupportedModel
from collegium.experts.engine.batch import PAGE, Batch
from collegium.experts.engine.dense import DenseDecoder
from collegium.experts.engine.lora import LoraWeights, read_lora
from collegium.experts.engine.shape import read_shape
from collegium.experts.engine.stack import LoraStack, Route
from collegium.tests.engine_models import TOKENS, VOCAB, Row, feed, reference, run, tiny_lm, tiny_lora

ARCHITECTURES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"]
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}
LORAS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "small": {"r": 2, "lora_alpha": 3, "use_rslora": True},
    "partial": {
        "r": 7,
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "pattern": {"r": 4, "rank_pattern": {"layers.0.mlp.down_proj": 6, "v_proj": 3}, "alpha_pattern": {"k_proj": 32}},
}
LoadDecoder = Callable[..., DenseDecoder]


def load_decoder(folder: Path, *, device: str = "cpu", dtype: str = "float32") -> DenseDecoder:
    import torch

    torch.set_num_threads(1)
    return DenseDecoder(folder, device=torch.device(device), dtype=getattr(torch, dtype), pages=32, slots=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm(tmp_path_factory.mktemp("base"), "Qwen2ForCausalLM")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: tiny_lora(root / name, base, seed=at, **LORAS[name]) for at, name in enumerate(LORAS, 1)}


@pytest.fixture(scope="module")
def loras(adapters: Mapping[str, Path]) -> dict[str, LoraWeights]:
    return {name: read_lora(folder, name) for name, folder in adapters.items()}


@pytest.fixture(scope="module")
def decoder(base: Path, loras: Mapping[str, LoraWeights]) -> DenseDecoder:
    """Slots 1 to 4 hold the adapters in their order."""
    loaded = load_decoder(base)
    for slot, lora in enumerate(loras.values(), 1):
        loaded.load(slot, lora)
    return loaded


@pytest.fixture(scope="module")
def alone(decoder: DenseDecoder) -> Callable[[int], Any]:
    """The logits of TOKENS through a slot, with nobody beside it."""
    found = [run(decoder, TOKENS, slot) for slot in range(5)]
    return lambda slot: found[slot]


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_model_of_transformers(architecture: str, tied: bool, kv_heads: int, tmp_path: Path) -> None:
    folder = tiny_lm(tmp_path, architecture, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    expected, decoder = reference(folder)(TOKENS), load_decoder(folder)
    for chunk in (0, 5, 1):
        np.testing.assert_allclose(run(decoder, TOKENS, chunk=chunk), expected, atol=1e-4)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_embeddings_are_those_of_transformers(rope: str, tmp_path: Path) -> None:
    folder = tiny_lm(tmp_path, rope_parameters=ROPES[rope] | {"rope_theta": 10_000.0})
    tokens = TOKENS * 6
    np.testing.assert_allclose(run(load_decoder(folder), tokens, chunk=50), reference(folder)(tokens), atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 16, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1},
    ],
)
def test_other_shapes_of_llama(config: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_lm(tmp_path, **config)
    np.testing.assert_allclose(run(load_decoder(folder), TOKENS, chunk=20), reference(folder)(TOKENS), atol=1e-4)


def test_within_its_window_a_sliding_model_is_the_same(tmp_path: Path) -> None:
    folder = tiny_lm(tmp_path, "MistralForCausalLM", sliding_window=20)
    decoder = load_decoder(folder)
    assert decoder.shape.context == 20
    np.testing.assert_allclose(run(decoder, TOKENS[:20]), reference(folder)(TOKENS[:20]), atol=1e-4)


@pytest.mark.parametrize("chunk", [0, 5, 1])
@pytest.mark.parametrize("name", LORAS)
def test_an_adapter_is_that_of_peft(
    name: str, chunk: int, base: Path, adapters: Mapping[str, Path], decoder: DenseDecoder
) -> None:
    expected = reference(base, adapters[name])(TOKENS)
    assert np.abs(expected - reference(base)(TOKENS)).max() > 0.5
    slot = list(LORAS).index(name) + 1
    np.testing.assert_allclose(run(decoder, TOKENS, slot, chunk=chunk), expected, atol=1e-4)


def test_a_slot_can_be_used_again(base: Path, loras: Mapping[str, LoraWeights], alone: Callable[[int], Any]) -> None:
    """By a smaller adapter than the one that was there, by a larger one, by one that leaves linears alone."""
    decoder = load_decoder(base)
    for name in ("plain", "small", "partial", "pattern", "small"):
        decoder.load(2, loras[name])
        for chunk in (0, 1):
            found = run(decoder, TOKENS, 2, chunk=chunk)
            np.testing.assert_allclose(found, alone(list(LORAS).index(name) + 1), atol=1e-4)
    np.testing.assert_allclose(run(decoder, TOKENS), alone(0), atol=1e-4)


@settings(max_examples=30)
@given(data=st.data(), slots=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_sequences_do_not_disturb_each_other(
    decoder: DenseDecoder, alone: Callable[[int], Any], data: st.DataObject, slots: list[int]
) -> None:
    """Whoever is in a batch, with whichever adapters, and however many tokens each brings at a time."""
    rows = [Row(TOKENS, range(3 * at, 3 * at + 3), slot) for at, slot in enumerate(slots)]
    while waiting := [row for row in rows if row.done < len(TOKENS)]:
        chosen = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique_by=id))
        steps = [data.draw(st.sampled_from([1, 1, 2, 17, len(TOKENS)])) for _ in chosen]
        counts = [min(step, len(TOKENS) - row.done) for step, row in zip(steps, chosen, strict=True)]
        for row, found in zip(chosen, feed(decoder, chosen, counts), strict=True):
            np.testing.assert_allclose(found, alone(row.slot)[row.done - len(found) : row.done], atol=1e-4)


def test_one_token_of_each_sequence(decoder: DenseDecoder, alone: Callable[[int], Any]) -> None:
    """Decoding: sequences of different lengths and adapters, some of them the same."""
    rows = [Row(TOKENS, range(3 * at, 3 * at + 3), slot) for at, slot in enumerate((0, 3, 1, 1, 0, 4))]
    feed(decoder, rows, [1, 16, 15, 33, 2, 17])
    for _ in range(3):
        for row, found in zip(rows, feed(decoder, rows, [1] * len(rows)), strict=True):
            np.testing.assert_allclose(found[0], alone(row.slot)[row.done - 1], atol=1e-4)


def test_gathered_adapters_are_the_same_as_one_after_the_other(base: Path, loras: Mapping[str, LoraWeights]) -> None:
    """What a GPU does is what a CPU does."""
    import torch

    outs = {name: out for name, (out, _) in read_shape(base).linears.items() if name in ("gate_proj", "up_proj")}
    stack = LoraStack(1, outs, 32, slots=4, device=torch.device("cpu"))
    for slot, lora in enumerate(loras.values(), 1):
        stack.load(slot, lora)
    x = torch.randn(8, 32)
    runs, gathered = torch.ones(8, 96), torch.ones(8, 96)
    stack.add(x, runs, Route(2, ((2, 3, 1), (3, 5, 2), (5, 6, 3), (6, 8, 4))))
    stack.add(x, gathered, Route(2, (), torch.tensor([1, 2, 2, 3, 4, 4])))
    torch.testing.assert_close(gathered, runs)
    assert (runs[:2] == 1).all()
    assert (runs[5, :48] == 1).all(), "the third adapter leaves gate_proj alone"
    assert ((runs[2:] != 1).any(1)).all()


def test_pages_of_a_prefix_are_shared(decoder: DenseDecoder, alone: Callable[[int], Any]) -> None:
    first = Row(TOKENS, [7, 3, 5], slot=1)
    feed(decoder, [first], [PAGE + 4])
    second = Row(TOKENS, [7, 9, 2], slot=1, done=PAGE)
    (found,) = feed(decoder, [second], [len(TOKENS) - PAGE])
    np.testing.assert_allclose(found, alone(1)[PAGE:], atol=1e-4)


@pytest.mark.parametrize("wanted", [[], [2], [4, 0]])
def test_only_what_is_wanted_is_returned(decoder: DenseDecoder, alone: Callable[[int], Any], wanted: list[int]) -> None:
    numbers = np.arange(5, dtype=np.int32)
    zeros = np.zeros(1, np.int32)
    batch = Batch(
        np.array(TOKENS[:5], np.int32), numbers, zeros.repeat(5), zeros[None], zeros, np.array(wanted, np.int32)
    )
    found = decoder.forward(batch)
    assert (found.dtype.name, found.shape) == ("float32", (len(wanted), VOCAB))
    np.testing.assert_allclose(found, alone(0)[wanted], atol=1e-4)


def test_bfloat16_is_that_of_transformers(
    base: Path, adapters: Mapping[str, Path], loras: Mapping[str, LoraWeights]
) -> None:
    decoder = load_decoder(base, dtype="bfloat16")
    decoder.load(1, loras["plain"])
    assert decoder.page_bytes == 2 * 2 * PAGE * 2 * 8 * 2
    for slot, adapter in ((0, None), (1, adapters["plain"])):
        expected = reference(base, adapter, dtype="bfloat16")(TOKENS)
        for chunk in (0, 1):
            assert np.abs(run(decoder, TOKENS, slot, chunk=chunk) - expected).mean() < 0.005 * expected.std()


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    other = tiny_lm(tmp_path / "other", intermediate_size=64)
    lora = read_lora(tiny_lora(tmp_path / "lora", other), "law@1")
    with pytest.raises(ArtifactCorrupt, match=r"layers\.0\.down_proj of the adapter law@1"):
        load_decoder(base).load(1, lora)


def test_a_checkpoint_that_differs_from_its_configuration_is_refused(tmp_path: Path) -> None:
    folder = tiny_lm(tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text("utf-8").replace('"intermediate_size": 48', '"intermediate_size": 40'), "utf-8")
    with pytest.raises(UnsupportedModel, match=r"\(96, 32\), its config.json means \(80, 32\)"):
        load_decoder(folder)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gpu_computes_the_same(architecture: str, tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    folder = tiny_lm(tmp_path / "base", architecture)
    adapter = tiny_lora(tmp_path / "lora", folder, **LORAS["plain"])
    for dtype, part in (("float32", 1e-3), ("bfloat16", 0.05)):  # of other kernels than the CPU's
        decoder = load_decoder(folder, device="cuda", dtype=dtype)
        decoder.load(1, read_lora(adapter, "plain"))
        for slot, name in ((0, None), (1, adapter)):
            expected = reference(folder, name, dtype=dtype)(TOKENS)
            for chunk in (0, 5, 1):
                assert np.abs(run(decoder, TOKENS, slot, chunk=chunk) - expected).mean() < part * expected.std()
        rows = [Row(TOKENS, range(3 * at, 3 * at + 3), slot) for at, slot in enumerate((0, 1, 2, 3))]
        for slot in (2, 3):
            decoder.load(slot, read_lora(adapter, "plain"))
        for row, found in zip(rows, feed(decoder, rows, [1] * 4), strict=True):  # gathered for
            expected = reference(folder, adapter if row.slot else None, dtype=dtype)(TOKENS[:1])
            assert np.abs(found - expected).mean() < part * expected.std()
