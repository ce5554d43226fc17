"""A PEFT folder is taken in only if it can serve on the base model; what stands in the way is named."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from collegium.errors import CollegiumError, InvalidRequest, UnsupportedModel
from collegium.experts.adapters import CONFIG, HONOURED, WEIGHTS, WITHOUT_EFFECT, store_adapter
from collegium.experts.artifacts import ArtifactStore
from collegium.models.cache import CachedModel, ModelCache
from collegium.tests.engine_models import tiny_lora

if TYPE_CHECKING:
    from torch import Tensor

    from collegium.schema import Lora

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, "Tensor"]], None]


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> CachedModel:
    return ModelCache(tmp_path_factory.mktemp("models")).get(str(tiny_base))


@pytest.fixture
def folder(adapters: Mapping[str, Path], tmp_path: Path) -> Path:
    """An adapter that fits; each test makes it into one that does not."""
    return shutil.copytree(adapters["law"], tmp_path / "adapter")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


@pytest.fixture
def take(base: CachedModel, store: ArtifactStore, tmp_path: Path) -> Callable[[Path], Lora]:
    return lambda folder: store_adapter(folder, base, store, tmp_path / "scratch")


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | changes), "utf-8")


def reweigh(folder: Path, change: Change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def test_a_plain_adapter_is_stored(
    take: Callable[[Path], Lora], store: ArtifactStore, folder: Path, tmp_path: Path
) -> None:
    (folder / "training_args.bin").write_bytes(pickle.dumps({"lr": 1}))
    (folder / "checkpoint").mkdir()
    spec = take(folder)
    stored = store.verify(spec.adapter)
    assert (spec.rank, spec.kind) == (4, "lora")
    assert sorted(path.name for path in stored.iterdir()) == [CONFIG, WEIGHTS]
    assert (stored / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert not (tmp_path / "scratch").exists()
    assert (folder / "training_args.bin").exists()


def test_where_it_was_trained_does_not_change_its_name(take: Callable[[Path], Lora], folder: Path) -> None:
    first = take(folder)
    configure(folder, base_model_name_or_path="/somewhere/else")
    assert take(folder) == first
    configure(folder, lora_alpha=5)
    assert take(folder).adapter != first.adapter


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"use_dora": True, "bias": "all"}, "use_dora, bias=all"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"monteclora_config": {"num_samples": 8}}, "monteclora_config"),
        ({"velora_config": {}}, "velora_config"),
        ({"megatron_config": {"hidden_size": 32}}, "megatron_config"),
        ({"runtime_config": {"ephemeral_gpu_offload": True}}, "runtime_config"),
        ({"use_something_of_tomorrow": True}, "use_something_of_tomorrow"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"peft_type": None}, "None"),
        # Loading one of these changes the base model's own weights or layers, which all experts share.
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"init_lora_weights": "mica"}, "mica"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    take: Callable[[Path], Lora], store: ArtifactStore, folder: Path, changes: Mapping[str, Any], named: str
) -> None:
    configure(folder, **changes)
    with pytest.raises(UnsupportedModel, match=named) as caught:
        take(folder)
    assert caught.value.hint
    assert not list(store.root.iterdir())


def test_every_field_of_peft_is_followed_without_effect_or_refused() -> None:
    """A PEFT that knows more fields must be looked at: is an adapter that sets them plain LoRA?"""
    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    refused = {"use_dora", "modules_to_save", "lora_bias", "fan_in_fan_out", "trainable_token_indices"}
    refused |= {"alora_invocation_tokens", "target_parameters", "arrow_config", "use_qalora", "use_bdlora"}
    refused |= {"kasa_config", "monteclora_config", "velora_config", "megatron_config", "layer_replication"}
    assert fields - HONOURED - WITHOUT_EFFECT <= refused | {"runtime_config"}


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.1},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"modules_to_save": []},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},  # it starts from activations, the base stays
    ],
)
def test_what_is_plain_lora_is_taken_in(take: Callable[[Path], Lora], folder: Path, changes: Mapping[str, Any]) -> None:
    configure(folder, **changes)
    assert take(folder).rank == 4


def test_patterns_keep_their_order(take: Callable[[Path], Lora], store: ArtifactStore, folder: Path) -> None:
    """PEFT takes the first that matches."""
    patterns = {"self_attn.q_proj": 3, "layers.0.self_attn.q_proj": 5}
    configure(folder, alpha_pattern=patterns)
    stored = json.loads((store.verify(take(folder).adapter) / CONFIG).read_text("utf-8"))
    assert list(stored["alpha_pattern"]) == list(patterns)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_only_the_linears_of_the_layers_may_be_changed(
    take: Callable[[Path], Lora], tiny_base: Path, tmp_path: Path, target: str
) -> None:
    folder = tiny_lora(tmp_path / "adapter", tiny_base, target_modules=["q_proj", target])
    with pytest.raises(UnsupportedModel, match=rf"changes .*{target}"):
        take(folder)


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(take: Callable[[Path], Lora], folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(InvalidRequest, match=f"adapter has no {missing}") as caught:
        take(folder)
    assert caught.value.hint


def test_a_missing_folder_is_named(take: Callable[[Path], Lora], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="nowhere"):
        take(tmp_path / "nowhere")


class Boom:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS])
def test_a_pickle_is_never_read(take: Callable[[Path], Lora], folder: Path, tmp_path: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Boom(tmp_path / "boom")))
    with pytest.raises(InvalidRequest, match="safetensors"):
        take(folder)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("content", ["{", "[]", "[1, 2]", "null", '"LORA"', '{"peft_type": "LORA"}', "\xff"])
def test_a_config_that_is_none_is_refused(take: Callable[[Path], Lora], folder: Path, content: str) -> None:
    (folder / CONFIG).write_text(content, "latin-1")
    with pytest.raises(CollegiumError):
        take(folder)


def test_weights_that_were_cut_are_refused(take: Callable[[Path], Lora], folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-64])
    with pytest.raises(InvalidRequest, match=WEIGHTS):
        take(folder)


def wider(tensors: dict[str, Tensor]) -> None:
    """As if the base model were 48 wide."""
    tensors[f"{FIRST}.lora_A.weight"] = tensors[f"{FIRST}.lora_A.weight"].new_ones(4, 48)


def taller(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}.lora_B.weight"] = tensors[f"{FIRST}.lora_B.weight"].new_ones(48, 4)


def flat(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}.lora_A.weight"] = tensors[f"{FIRST}.lora_A.weight"].flatten()


def deeper(tensors: dict[str, Tensor]) -> None:
    """As if the base model had more layers."""
    for part in ("A", "B"):
        tensors[f"{FIRST.replace('.0.', '.7.')}.lora_{part}.weight"] = tensors[f"{FIRST}.lora_{part}.weight"].clone()


def foreign(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"] = tensors[f"{FIRST}.lora_A.weight"].clone()


def head(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = tensors[f"{FIRST}.lora_A.weight"].new_ones(267, 32)


def other_rank(tensors: dict[str, Tensor]) -> None:
    """Rank 2 where the configuration says 4."""
    tensors[f"{FIRST}.lora_A.weight"] = tensors[f"{FIRST}.lora_A.weight"][:2]
    tensors[f"{FIRST}.lora_B.weight"] = tensors[f"{FIRST}.lora_B.weight"][:, :2]


def half_a_layer(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{FIRST}.lora_B.weight"]


def without_a_layer(tensors: dict[str, Tensor]) -> None:
    for part in ("A", "B"):
        del tensors[f"{FIRST}.lora_{part}.weight"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (wider, f"{FIRST}.lora_A"),
        (taller, f"{FIRST}.lora_B"),
        (flat, f"{FIRST}.lora_A"),
        (deeper, "layers.7.self_attn.q_proj"),
        (foreign, "transformer.h.0.attn.c_attn"),
        (head, "lm_head"),
        # The engine could not load these: PEFT finds another shape, or no weights, where the configuration promises some.
        (other_rank, "layers.0.self_attn.q_proj"),
        (half_a_layer, "layers.0.self_attn.q_proj"),
        (without_a_layer, "layers.0.self_attn.q_proj"),
        (dict.clear, ""),
    ],
)
def test_weights_that_do_not_fit_are_named(
    take: Callable[[Path], Lora], store: ArtifactStore, folder: Path, change: Change, named: str
) -> None:
    reweigh(folder, change)
    with pytest.raises(CollegiumError) as caught:
        take(folder)
    assert named in caught.value.message
    assert caught.value.hint
    assert not list(store.root.iterdir())
