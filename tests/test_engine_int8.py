"""The int8 decoder computes what its quantisation means, to the bit the same whoever is beside it and however it is cut."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.errors import ArtifactCorrupt, CollegiumError, ModelUnavailable, UnsupportedModel
from collegium.experts.engine import kernels, native
from collegium.experts.engine.batch import PAGE, Batch, Floats
from collegium.experts.engine.int8 import Int8Decoder
from collegium.experts.engine.lora import LoraWeights, read_lora
from collegium.tests.engine_models import TOKENS, VOCAB, Row, feed, reference, run, tiny_lm, tiny_lora
from collegium.tests.int8_reference import quantised_reference

ARCHITECTURES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"]
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}
SHAPES: dict[str, dict[str, Any]] = {
    "biases": {"attention_bias": True, "mlp_bias": True},
    "more than a group": {"hidden_size": 100, "intermediate_size": 200, "vocab_size": 130, "num_attention_heads": 5}
    | {"num_key_value_heads": 5},
    "whole groups": {"hidden_size": 128, "intermediate_size": 192, "head_dim": 16, "vocab_size": 128},
    "not whole vectors": {"hidden_size": 36, "intermediate_size": 70, "head_dim": 40, "num_attention_heads": 9}
    | {"num_key_value_heads": 3},
    "large heads": {"hidden_size": 64, "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "small": {"hidden_size": 14, "intermediate_size": 6, "head_dim": 2, "num_attention_heads": 7}
    | {"num_key_value_heads": 1},
    "a few heads a key": {"head_dim": 64, "num_attention_heads": 16, "num_key_value_heads": 1},
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORAS: dict[str, dict[str, Any]] = {
    **{f"rank {rank}": {"r": rank, "lora_alpha": rank / 2} for rank in (1, 2, 4, 8, 64, 65, 256)},
    "rank-stabilized": {"r": 7, "lora_alpha": 3, "use_rslora": True},
    "attention": {"r": 7, "target_modules": ["q_proj", "v_proj"]},
    "down": {"r": 3, "target_modules": ["down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "pattern": {"r": 4, "target_modules": ALL, "alpha_pattern": {"k_proj": 32}}
    | {"rank_pattern": {"q_proj": 65, "v_proj": 130, "up_proj": 1, "layers.0.mlp.down_proj": 6}},
}
SLOTS = ("", "rank 1", "rank 65", "attention", "pattern")
"""What the slots of the common decoder hold."""
Reference = Callable[[Sequence[int]], Floats]


def load_int8(folder: Path, **sizes: int) -> Int8Decoder:
    defaults = {"pages": 32, "slots": len(SLOTS) - 1, "most_tokens": 256, "threads": 1}
    return Int8Decoder(folder, **defaults | sizes)


def assert_computes(decoder: Int8Decoder, expected: Reference, slot: int = 0, length: int = len(TOKENS)) -> None:
    """Equal but for the rounding of sums.

    That turns the byte of an activation that lies half-way between two steps, and what follows it is a little off, so one
    prompt of several must be free of that.
    """
    for seed in range(10):
        tokens = np.random.default_rng(seed).integers(0, VOCAB, length).tolist()
        wanted = expected(tokens)
        off = np.abs(run(decoder, tokens, slot, chunk=20) - wanted) / wanted.std()
        assert off.mean() < 0.03
        if np.mean(off.max(1) < 1e-5) > 0.9:
            return
    raise AssertionError("no prompt is computed as it should be")


def assert_near(found: Floats, expected: Floats, correlation: float, part: float) -> None:
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > correlation
    assert np.abs(found - expected).mean() < part * expected.std()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return tiny_lm(folder, "Qwen2ForCausalLM", hidden_size=72, intermediate_size=150, num_attention_heads=6)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: tiny_lora(root / name, base, seed=at, **LORAS[name]) for at, name in enumerate(LORAS, 1)}


@pytest.fixture(scope="module")
def loras(adapters: Mapping[str, Path]) -> dict[str, LoraWeights]:
    return {name: read_lora(folder, name) for name, folder in adapters.items()}


@pytest.fixture(scope="module")
def make(base: Path, loras: Mapping[str, LoraWeights]) -> Callable[..., Int8Decoder]:
    def load(**sizes: int) -> Int8Decoder:
        decoder = load_int8(base, **sizes)
        for slot, name in enumerate(SLOTS[1:], 1):
            decoder.load(slot, loras[name])
        return decoder

    return load


@pytest.fixture(scope="module")
def decoder(make: Callable[..., Int8Decoder]) -> Int8Decoder:
    return make(threads=2)


@pytest.fixture(scope="module")
def alone(make: Callable[..., Int8Decoder]) -> list[Floats]:
    """The logits of TOKENS through each slot, on one thread."""
    one = make()
    return [run(one, TOKENS, slot) for slot in range(len(SLOTS))]


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_model_of_transformers(architecture: str, tied: bool, kv_heads: int, tmp_path: Path) -> None:
    folder = tiny_lm(tmp_path, architecture, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    decoder = load_int8(folder)
    assert_computes(decoder, quantised_reference(folder))
    assert_near(run(decoder, TOKENS), reference(folder)(TOKENS), 0.998, 0.04)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_embeddings_are_those_of_transformers(rope: str, tmp_path: Path) -> None:
    folder = tiny_lm(tmp_path, rope_parameters=ROPES[rope] | {"rope_theta": 10_000.0})
    assert_computes(load_int8(folder), quantised_reference(folder), length=200)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_odd_sizes(architecture: str, shape: str, tmp_path: Path) -> None:
    folder = tiny_lm(tmp_path, architecture, **SHAPES[shape])
    tiny_lora(tmp_path / "lora", folder, r=5)
    decoder = load_int8(folder)
    decoder.load(2, read_lora(tmp_path / "lora", "odd"))
    for slot, adapter in ((0, None), (2, tmp_path / "lora")):
        assert_computes(decoder, quantised_reference(folder, adapter), slot)
        assert_near(run(decoder, TOKENS, slot), reference(folder, adapter)(TOKENS), 0.95, 0.2)


@pytest.mark.parametrize("name", LORAS)
def test_an_adapter_is_that_of_peft(
    name: str, base: Path, adapters: Mapping[str, Path], loras: Mapping[str, LoraWeights]
) -> None:
    decoder = load_int8(base)
    decoder.load(3, loras[name])
    assert_computes(decoder, quantised_reference(base, adapters[name]), 3)
    expected = reference(base, adapters[name])(TOKENS)
    assert np.abs(expected - reference(base)(TOKENS)).max() > 0.5
    assert_near(run(decoder, TOKENS, 3), expected, 0.95, 0.2)


def test_a_slot_can_be_used_again(base: Path, loras: Mapping[str, LoraWeights], alone: list[Floats]) -> None:
    """By a smaller adapter than the one that was there, by a larger one, by one that leaves linears alone."""
    decoder = load_int8(base)
    for name in ("rank 65", "rank 1", "attention", "pattern", "rank 1"):
        decoder.load(2, loras[name])
        gc.collect()
        np.testing.assert_array_equal(run(decoder, TOKENS, 2), alone[SLOTS.index(name)])
    np.testing.assert_array_equal(run(decoder, TOKENS), alone[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 5, 16, 17])
def test_a_prompt_may_be_cut_anywhere(
    threads: int, chunk: int, make: Callable[..., Int8Decoder], alone: list[Floats]
) -> None:
    decoder = make(threads=threads)
    for slot in range(len(SLOTS)):
        np.testing.assert_array_equal(run(decoder, TOKENS, slot, chunk=chunk), alone[slot])
    decoder.close()


@settings(max_examples=20)
@given(data=st.data(), slots=st.lists(st.integers(0, len(SLOTS) - 1), min_size=1, max_size=9))
def test_sequences_do_not_disturb_each_other(
    decoder: Int8Decoder, alone: list[Floats], data: st.DataObject, slots: list[int]
) -> None:
    """Whoever is in a batch, with whichever adapters, and however many tokens each brings at a time."""
    pages = data.draw(st.permutations(range(32)))
    rows = [Row(TOKENS, pages[3 * at : 3 * at + 3], slot) for at, slot in enumerate(slots)]
    while waiting := [row for row in rows if row.done < len(TOKENS)]:
        chosen = data.draw(st.lists(st.sampled_from(waiting), min_size=1, max_size=6, unique_by=id))
        steps = [data.draw(st.sampled_from([1, 1, 2, 17, len(TOKENS)])) for _ in chosen]
        counts = [min(step, len(TOKENS) - row.done) for step, row in zip(steps, chosen, strict=True)]
        for row, found in zip(chosen, feed(decoder, chosen, counts), strict=True):
            np.testing.assert_array_equal(found, alone[row.slot][row.done - len(found) : row.done])


def test_pages_of_a_prefix_are_shared(decoder: Int8Decoder, alone: list[Floats]) -> None:
    first = Row(TOKENS, [7, 3, 5], slot=1)
    feed(decoder, [first], [PAGE + 4])
    rows = [Row(TOKENS, [7, 9, 2], 1, PAGE), Row(TOKENS, [7, 11, 1], 1, PAGE), first]
    counts = [len(TOKENS) - row.done for row in rows]
    for row, found in zip(rows, feed(decoder, rows, counts), strict=True):
        np.testing.assert_array_equal(found, alone[1][row.done - len(found) :])


def test_what_overflowed_does_not_reach_those_who_get_its_pages(
    base: Path, alone: list[Floats], tmp_path: Path
) -> None:
    decoder = load_int8(base)
    huge = read_lora(tiny_lora(tmp_path, base), "huge")
    for a, b in huge.modules.values():
        a.mul_(1e18)
        b.mul_(1e18)
    decoder.load(1, huge)
    rows = [Row(TOKENS * 2, range(5), 1), Row(TOKENS, range(5, 8))]
    spoilt, beside = feed(decoder, rows, [70, len(TOKENS)])
    assert not np.isfinite(spoilt).all()
    np.testing.assert_array_equal(beside, alone[0])
    for chunk in (0, 1):
        np.testing.assert_array_equal(run(decoder, TOKENS, chunk=chunk), alone[0])


def test_the_last_position_of_the_context(tmp_path: Path) -> None:
    folder = tiny_lm(tmp_path, max_position_embeddings=70)
    for pages in (5, 32):
        assert_computes(load_int8(folder, pages=pages), quantised_reference(folder), length=70)


@pytest.mark.parametrize("wanted", [[], [2], [4, 0], [1, 1, 1]])
def test_only_what_is_wanted_is_returned(decoder: Int8Decoder, alone: list[Floats], wanted: list[int]) -> None:
    found = decoder.forward(batch_of(wanted=wanted))
    assert (found.dtype.name, found.shape) == ("float32", (len(wanted), VOCAB))
    np.testing.assert_array_equal(found, alone[0][wanted])


def batch_of(**changes: list[Any]) -> Batch:
    """Five tokens of one sequence."""
    fields: dict[str, list[Any]] = {"tokens": TOKENS[:5], "positions": list(range(5)), "sequence": [0] * 5}
    fields.update(pages=[[0]], slots=[0], wanted=[4])
    fields.update(changes)
    return Batch(**{name: np.array(values, np.int32) for name, values in fields.items()})


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": [1, 2, 3, 4, VOCAB]},
        {"tokens": [-1, 2, 3, 4, 5]},
        {"positions": [0, 1, 2, 3, 16]},
        {"positions": [0, 1, 2, 3, 512], "pages": [[0] * 40]},
        {"positions": [-1, 0, 1, 2, 3]},
        {"sequence": [0, 0, 0, 0, 1]},
        {"sequence": [0, 0, 0, 0, -1]},
        {"pages": [[32]]},
        {"pages": [[-1]]},
        {"slots": [5]},
        {"slots": [-1]},
        {"wanted": [5]},
        {"wanted": [-1]},
        {"wanted": [0] * 257},
        {"tokens": [1] * 257, "positions": [0] * 257, "sequence": [0] * 257},
    ],
)
def test_a_batch_outside_the_model_is_refused(decoder: Int8Decoder, changes: dict[str, list[Any]]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        decoder.forward(batch_of(**changes))


def test_types_of_checkpoints(tmp_path: Path) -> None:
    """A checkpoint in bfloat16 is the same model as its float32 copy; one in float16 is nearly that."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_lm(tmp_path / "float32"), dtype=torch.bfloat16)
    for name in ("bfloat16", "float16", "float32"):
        model.to(getattr(torch, name)).save_pretrained(tmp_path / name)
    whole = run(load_int8(tmp_path / "float32"), TOKENS)
    np.testing.assert_array_equal(run(load_int8(tmp_path / "bfloat16"), TOKENS), whole)
    assert_near(run(load_int8(tmp_path / "float16"), TOKENS), whole, 0.999, 0.001)


def test_matrices_that_are_read_in_slices(base: Path, alone: list[Floats], monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (32, 64, 96):
        monkeypatch.setattr("collegium.experts.engine.int8.SLICE", rows)
        np.testing.assert_array_equal(run(load_int8(base), TOKENS), alone[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_a_model_that_is_not_finite_is_refused(name: str, value: float, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=rf"^{name} .* not finite"):
        load_int8(copy_of(base, tmp_path, name, lambda tensor: tensor.view(-1)[-1:].fill_(value)))


def copy_of(base: Path, folder: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """The model with a tensor changed in place, or replaced by what `change` returns where that is one."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    changed = change(tensors[name])
    if changed.untyped_storage().data_ptr() != tensors[name].untyped_storage().data_ptr():
        tensors[name] = changed
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_checkpoint_that_differs_from_its_configuration_is_refused(name: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=rf"^{name} is \(.*\), the model's config.json means \("):
        load_int8(copy_of(base, tmp_path, name, lambda tensor: tensor[:-1].clone()))


def test_very_small_weights_count_as_zero(base: Path, tmp_path: Path) -> None:
    """The inverse of their scale would be infinite."""
    name = "model.layers.0.mlp.up_proj.weight"
    small, zero = tmp_path / "small", tmp_path / "zero"
    for folder in (small, zero):
        folder.mkdir()
    copy_of(base, small, name, lambda tensor: tensor.fill_(1e-37))
    copy_of(base, zero, name, lambda tensor: tensor.zero_())
    np.testing.assert_array_equal(run(load_int8(small), TOKENS), run(load_int8(zero), TOKENS))


def test_an_adapter_that_does_not_fit_leaves_its_slot_as_it_was(
    base: Path, decoder: Int8Decoder, alone: list[Floats], tmp_path: Path
) -> None:
    other = tiny_lm(tmp_path / "other", intermediate_size=64)
    wide = tiny_lora(tmp_path / "wide", base, r=257, target_modules=["down_proj"])
    broken = read_lora(tiny_lora(tmp_path / "broken", base), "broken@1")
    broken.modules[1, "up_proj"][1][3, 2] = float("nan")
    cases: list[tuple[LoraWeights, type[CollegiumError], str]] = [
        (read_lora(tiny_lora(tmp_path / "lora", other), "law@1"), ArtifactCorrupt, "of the adapter law@1"),
        (read_lora(wide, "wide@1"), UnsupportedModel, "wide@1 is of rank 257"),
        (broken, ArtifactCorrupt, r"layers\.1\.up_proj of the adapter broken@1 .* not finite"),
    ]
    for lora, error, words in cases:
        with pytest.raises(error, match=words):
            decoder.load(2, lora)
        np.testing.assert_array_equal(run(decoder, TOKENS, 2), alone[2])


@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64"])
def test_other_processors(
    processor: str, base: Path, adapters: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without AVX-512, and without AVX; what this processor has is what all other tests run on."""
    if platform.machine() != "x86_64" or (
        processor == "x86-64-v3" and " avx2 " not in Path("/proc/cpuinfo").read_text()
    ):
        pytest.skip("another kind of processor")
    compiled = compile_kernels(tmp_path / "int8.so", "-O1", f"-march={processor}")
    monkeypatch.setattr(kernels, "library", lambda: ctypes.CDLL(str(compiled)))
    decoder = load_int8(base, threads=2)
    for slot, name in enumerate(("rank 1", "pattern"), 1):
        decoder.load(slot, read_lora(adapters[name], name))
        assert_computes(decoder, quantised_reference(base, adapters[name]), slot)
    whole = run(decoder, TOKENS, 2)
    rows = [Row(TOKENS, range(3 * at, 3 * at + 3), slot) for at, slot in enumerate((2, 1, 0))]
    for count in (1, 5, 17, 14):
        found = feed(decoder, rows, [count] * 3)[0]
        np.testing.assert_array_equal(found, whole[rows[0].done - count : rows[0].done])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
@pytest.mark.parametrize("processor", ["native", "x86-64-v3"])
def test_no_sanitizer_complains(
    kind: str, processor: str, base: Path, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    """Random batches through kernels that watch every access, in a process of their own."""
    libraries = [runtime_of(name) for name in {"thread": ["tsan"]}.get(kind, ["asan", "ubsan"])]
    if platform.machine() != "x86_64" or not all(libraries):
        pytest.skip("no sanitizers")
    flags = ("-O1", "-g", f"-march={processor}", f"-fsanitize={kind}", "-fno-sanitize-recover=undefined")
    compiled = compile_kernels(tmp_path / "int8.so", *flags)
    script = Path(__file__).with_name("int8_batches.py")
    command = ["setarch", "-R", sys.executable, str(script), str(compiled), str(base), *map(str, adapters.values())]
    environment = os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    environment |= {"TSAN_OPTIONS": "exitcode=66", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


def compile_kernels(path: Path, *flags: str) -> Path:
    compiler = next(found for name in native.COMPILERS if (found := shutil.which(name)))
    plain = [flag for flag in native.FLAGS if flag != "-O3"]
    subprocess.run([compiler, *plain, *flags, str(native.SOURCE), "-o", str(path), "-lm"], check=True, timeout=300)
    return path


def runtime_of(name: str) -> str:
    """The path of a sanitizer's library, or nothing."""
    if not shutil.which("gcc") or not shutil.which("setarch"):
        return ""
    asked = subprocess.run(["gcc", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True)
    return asked.stdout.strip() if "/" in asked.stdout else ""


def test_too_little_memory(base: Path) -> None:
    with pytest.raises(ModelUnavailable, match="too little memory"):
        load_int8(base, pages=1 << 36)


def test_it_can_be_closed_twice_or_forgotten(base: Path) -> None:
    before = threads_alive()
    first, second = load_int8(base, threads=3), load_int8(base, threads=3)
    run(second, TOKENS)
    assert not before or threads_alive() == before + 4
    first.close()
    first.close()
    with pytest.raises(ValueError, match="does not fit"):
        first.forward(batch_of())
    del second
    gc.collect()
    assert threads_alive() == before


def threads_alive() -> int:
    return len(list(Path("/proc/self/task").iterdir())) if Path("/proc/self/task").is_dir() else 0
