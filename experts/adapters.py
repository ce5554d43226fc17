"""Check a PEFT folder before it is taken in: what is in it, and whether it fits the base model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest, UnsupportedModel
from ..models.cache import CachedModel
from ..schema import Lora
from .artifacts import ArtifactStore

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGET = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>\d+)\.(self_attn|mlp)\."
    r"(?P<name>(?:q|k|v|o|gate|up|down)_proj))\.lora_(?P<half>[AB])\.weight"
)
"""The tensors that an adapter may hold: those of the linears of the layers, by the names of the Llama family."""
HONOURED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"}
HONOURED |= {"layers_to_transform", "layers_pattern", "bias", "init_lora_weights"}
"""Fields of LoraConfig that the engine follows; of the last two, some values."""
WITHOUT_EFFECT = {"peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"}
WITHOUT_EFFECT |= {"inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "ensure_weight_tying"}
WITHOUT_EFFECT |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
"""Fields that change nothing of what a plain adapter computes once it is trained."""
KEEP_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights; with the others the base model's own weights change, which all experts share."""


def store_adapter(folder: Path, base: CachedModel, artifacts: ArtifactStore, scratch: Path) -> Lora:
    """Check the adapter in `folder`, put its two files into the artifact store, and return its spec.

    Raises InvalidRequest where it is not a PEFT folder, UnsupportedModel where it needs something that is not supported or
    does not fit the base model; both name what.
    """
    config = _read_config(folder)
    check_config(config)
    _check_shapes(folder, base)
    scratch.mkdir(parents=True)
    try:
        shutil.copyfile(folder / WEIGHTS, scratch / WEIGHTS)
        # The card says which base it belongs to. A path of the machine that trained it would change the content hash.
        # Patterns within keep their order: the first that matches counts.
        portable = json.dumps(dict(sorted({**config, "base_model_name_or_path": None}.items())), indent=1)
        (scratch / CONFIG).write_text(portable, "utf-8")
        return Lora(adapter=artifacts.put(scratch), rank=int(config.get("r", 8)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read_config(folder: Path) -> dict[str, Any]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InvalidRequest(f"{folder} has no {name}.", hint="Name a PEFT adapter folder (safetensors).")
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{folder / CONFIG} is not JSON: {error}.", hint="Save the adapter again.") from None
    if not isinstance(config, dict) or "peft_type" not in config or not isinstance(config.get("r", 0), int):
        raise InvalidRequest(
            f"{folder / CONFIG} is not the configuration of an adapter.", hint="Save the adapter again."
        )
    return config


def check_config(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedModel where an adapter is not plain LoRA on linears, and names all that stands in the way.

    Fields that are not known are refused too where they are set: a newer PEFT may have learned to compute something else.
    """
    if config.get("peft_type") != "LORA":
        raise UnsupportedModel(f"The adapter is of the type {config.get('peft_type')}.", hint="Supported: LORA.")
    set_fields = [name for name, value in config.items() if value not in (None, False, [])]  # {} is a configuration
    names = [name for name in set_fields if name not in HONOURED | WITHOUT_EFFECT]
    if (bias := config.get("bias", "none")) != "none":
        names.append(f"bias={bias}")
    if (start := config.get("init_lora_weights", True)) not in KEEP_BASE:
        names.append(f"init_lora_weights={start}")
    if names:
        raise UnsupportedModel(
            f"The adapter uses {', '.join(names)}, which is not supported.", hint="Train plain LoRA."
        )


def _check_shapes(folder: Path, base: CachedModel) -> None:
    """Hold every tensor against what PEFT expects on the base model, which is built without weights for that."""
    from safetensors import SafetensorError, safe_open

    expected = _expected_shapes(folder, base)
    for key in sorted(expected):
        if not TARGET.fullmatch(key):
            raise UnsupportedModel(
                f"The adapter changes {key.removeprefix('base_model.model.')}, which is not supported.",
                hint="Train LoRA on the linears of the layers alone.",
            )
    try:
        with safe_open(folder / WEIGHTS, "np") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
    except SafetensorError as error:
        raise InvalidRequest(f"{folder / WEIGHTS} is not a safetensors file: {error}.", hint="Save it again.") from None
    for key in sorted({*expected, *found}):
        if expected.get(key) != found.get(key):
            raise UnsupportedModel(
                f"{key} is {found.get(key, 'missing')}, the base model needs {expected.get(key, 'nothing there')}.",
                hint=f"The adapter must have been trained on {base.name}.",
            )


def _expected_shapes(folder: Path, base: CachedModel) -> dict[str, tuple[int, ...]]:
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    build: Any = AutoModelForCausalLM  # from_config has no types
    with torch.device("meta"):
        model = build.from_config(AutoConfig.from_pretrained(base.folder))
        try:
            config: Any = PeftConfig.from_pretrained(str(folder))
            config.init_lora_weights = False
            config.base_model_name_or_path = None
            adapted = get_peft_model(model, config)
        except (ValueError, TypeError) as error:
            raise UnsupportedModel(
                f"The adapter does not fit the base model: {error}", hint=f"It must have been trained on {base.name}."
            ) from error
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {key: tuple(tensor.shape) for key, tensor in state.items()}
