"""Check a PEFT folder before it is taken in: what is in it, and whether it fits the base model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest, UnsupportedModel
from ..models.cache import CachedModel
from ..schema import Lora
from .artifacts import ArtifactStore

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def store_adapter(folder: Path, base: CachedModel, artifacts: ArtifactStore, scratch: Path) -> Lora:
    """Check the adapter in `folder`, put its two files into the artifact store, and return its spec.

    Raises InvalidRequest where it is not a PEFT folder, UnsupportedModel where it needs something that is not supported or
    does not fit the base model; both name what.
    """
    config = _read_config(folder)
    _refuse_unsupported(config)
    _check_shapes(folder / WEIGHTS, base)
    scratch.mkdir(parents=True)
    try:
        shutil.copyfile(folder / WEIGHTS, scratch / WEIGHTS)
        # The card says which base it belongs to. A path of the machine that trained it would change the content hash.
        portable = json.dumps({**config, "base_model_name_or_path": None}, indent=1, sort_keys=True)
        (scratch / CONFIG).write_text(portable, "utf-8")
        return Lora(adapter=artifacts.put(scratch), rank=int(config["r"]))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read_config(folder: Path) -> dict[str, Any]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InvalidRequest(f"{folder} has no {name}.", hint="Name a PEFT adapter folder (safetensors).")
    try:
        return dict(json.loads((folder / CONFIG).read_text("utf-8")))
    except ValueError as error:
        raise InvalidRequest(f"{folder / CONFIG} is not JSON: {error}.") from None


def _refuse_unsupported(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedModel(f"The adapter is of the type {config.get('peft_type')}.", hint="Supported: LORA.")
    wanted = {"use_dora": config.get("use_dora"), "modules_to_save": config.get("modules_to_save")}
    wanted["bias"] = config.get("bias", "none") != "none"
    if names := [name for name, value in wanted.items() if value]:
        raise UnsupportedModel(
            f"The adapter uses {', '.join(names)}, which is not supported.", hint="Train plain LoRA."
        )


def _check_shapes(weights: Path, base: CachedModel) -> None:
    """Hold every A [r, in] and B [out, r] against the base's layer of that name, without loading the base."""
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    build: Any = AutoModelForCausalLM  # from_config has no types
    with torch.device("meta"):
        model = build.from_config(AutoConfig.from_pretrained(base.folder))
    layers = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    try:
        with safe_open(weights, "np") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
    except SafetensorError as error:
        raise InvalidRequest(f"{weights} is not a safetensors file: {error}.") from None
    for key, shape in shapes.items():
        layer, _, part = key.removeprefix(_PREFIX).partition(".lora_")
        out_in = layers.get(f"{layer}.weight")
        fits = out_in is not None and (shape[1] == out_in[1] if part.startswith("A") else shape[0] == out_in[0])
        if not fits:
            raise UnsupportedModel(
                f"{key} {list(shape)} does not fit the base model, whose {layer} is {list(out_in or ())}.",
                hint=f"The adapter must have been trained on {base.name}.",
            )
