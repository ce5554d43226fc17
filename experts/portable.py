"""One expert as a plain PEFT folder: for the hub, for other programs, and to be imported again."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from ..errors import InvalidRequest
from ..models.cache import CachedModel, sync_tree
from ..models.names import parse_name
from ..models.space import space_for
from ..schema import Card, Lora, card_to_dict
from ..settings import DEFAULT_BASE
from .adapters import CONFIG, WEIGHTS
from .artifacts import ArtifactStore
from .lora_gguf import write_lora_gguf
from .model_card import model_card

CARD, README, GGUF = "card.json", "README.md", "adapter.gguf"
ORIGINALS = {DEFAULT_BASE: "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What the hub calls models that come from elsewhere; theirs is not quantised."""


def export_expert(card: Card, folder: Path, artifacts: ArtifactStore, base: CachedModel, *, gguf: bool = False) -> None:
    """Write the adapter of a LoRA expert, a model card and, with `gguf`, the same for llama.cpp.

    An earlier export in `folder` is replaced. Raises InvalidRequest where the expert has no adapter of this base model, or where
    something else stands in the folder, which is left alone; ArtifactCorrupt and NoSpace.
    """
    check_exportable(card, base)
    folder = folder.resolve()
    if folder.exists() and not _is_export(folder):
        raise InvalidRequest(f"{folder} holds something else.", hint="Name a new folder, or an earlier export.")
    with space_for(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            _write(card, new, artifacts, base, gguf=gguf)
            sync_tree(new)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)


def check_exportable(card: Card, base: CachedModel) -> None:
    """Raises InvalidRequest for an expert that no PEFT folder can hold."""
    if not isinstance(card.spec, Lora):
        what = (
            "answers with the base model as it is" if card.spec.kind == "base" else f"is of the kind {card.spec.kind}"
        )
        raise InvalidRequest(
            f"{card.version} {what}: it has no adapter of the base model that could be exported.",
            hint="Experts of the kind lora can be; `collegium releases export` writes all kinds.",
        )
    if card.base != base.identity:
        raise InvalidRequest(
            f"{card.version} is of the base model {card.base}, this home's is {base.identity}.",
            hint="Set base_model back.",
        )


def base_name(base: CachedModel) -> str:
    """What others call the base model: its name on the hub, or the last part of a folder's: the rest is of one machine."""
    parsed = parse_name(base.name)
    return ORIGINALS.get(base.name) or {"hf": parsed.location, "folder": Path(parsed.location).name}.get(
        parsed.source, base.name
    )


def _is_export(folder: Path) -> bool:
    ours = (folder / CARD).is_file() and (folder / CONFIG).is_file()
    return folder.is_dir() and (ours or not any(folder.iterdir()))


def _write(card: Card, folder: Path, artifacts: ArtifactStore, base: CachedModel, *, gguf: bool) -> None:
    assert isinstance(card.spec, Lora)
    stored = artifacts.verify(card.spec.adapter)
    config = json.loads((stored / CONFIG).read_text("utf-8"))
    name = base_name(base)
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": name}, indent=1), "utf-8")
    shutil.copyfile(stored / WEIGHTS, folder / WEIGHTS)
    (folder / CARD).write_text(json.dumps(card_to_dict(card), indent=1), "utf-8")
    (folder / README).write_text(model_card(card, name, gguf=GGUF if gguf else None), "utf-8")
    if gguf:
        alpha = float(config.get("lora_alpha", 8))
        write_lora_gguf(stored, base.folder, folder / GGUF, name=card.name, alpha=alpha)
