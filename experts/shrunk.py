"""A shrunk model as an artifact: which layers of the base model are kept, and a small adapter that heals the cut.

It is a few megabytes; the model itself is made of it and the base model when it is first needed, as a folder that transformers
loads. docs/proxy.md says what it is for.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactCorrupt
from ..models.cache import CachedModel, ModelCache
from .artifacts import ArtifactStore

RECIPE, ADAPTER = "shrunk.json", "adapter"
_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Shrunk:
    """`layers` of the model with the identity `base`, from 0, in order."""

    base: str
    layers: tuple[int, ...]

    def save(self, folder: Path) -> None:
        """Write it beside the healing adapter, a PEFT folder `adapter`, which may be missing."""
        (folder / RECIPE).write_text(json.dumps(asdict(self)), "utf-8")


def read_shrunk(folder: Path) -> Shrunk:
    """Raises ArtifactCorrupt where the folder is no shrunk model."""
    try:
        body = json.loads((folder / RECIPE).read_text("utf-8"))
        return Shrunk(str(body["base"]), tuple(map(int, body["layers"])))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArtifactCorrupt(f"{folder} is not a shrunk model: {error}.", hint="Shrink the model again.") from None


def open_shrunk(version: str, base: CachedModel, artifacts: ArtifactStore, cache: ModelCache) -> CachedModel:
    """The model of an artifact, made the first time. Raises ArtifactCorrupt where it is damaged or of another base model."""
    folder = artifacts.verify(version)
    shrunk = read_shrunk(folder)
    if shrunk.base != base.identity:
        raise ArtifactCorrupt(
            f"The shrunk model {version[:12]} was made of {shrunk.base}, this is {base.identity}.",
            hint="Shrink this base model, or set base_model back.",
        )
    adapter = folder / ADAPTER

    def build(target: Path) -> None:
        model = cut(base, shrunk.layers)
        if adapter.is_dir():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        save_model(model, base, target)

    return cache.derive(f"shrunk-{version[:_DIGITS]}", f"artifact:{version}", build)


def cut(base: CachedModel, layers: tuple[int, ...]) -> Any:
    """The base model with these layers alone, as transformers loads it, in the type that its weights are stored in."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base.folder, dtype="auto")
    model.model.layers = torch.nn.ModuleList([model.model.layers[at] for at in layers])
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[at] for at in layers]
    return model.eval()


def save_model(model: Any, base: CachedModel, target: Path) -> None:
    """Write a model that was made of the base model, with its tokenizer."""
    from transformers import AutoTokenizer

    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(base.folder).save_pretrained(target)
