"""A release as a plain folder: `release.json`, `cards/` and `artifacts/`. The project ships one, and seeds a home from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..errors import ArtifactCorrupt
from ..schema import Card, Lora, Plugin, Release, card_from_dict, card_to_dict
from .artifacts import ArtifactStore
from .registry import Registry


def export_release(folder: Path, registry: Registry, artifacts: ArtifactStore, release: Release) -> None:
    """Write `release` with everything that it names into `folder`, which is replaced in one rename."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "cards").mkdir(parents=True)
    cards = {name: registry.card(version) for name, version in release.aliases.items()}
    for name, card in cards.items():
        (temporary / "cards" / f"{name}.json").write_text(json.dumps(card_to_dict(card), indent=1), "utf-8")
    (temporary / "artifacts").mkdir()
    for version in _artifacts_of(release, list(cards.values())):
        shutil.copytree(artifacts.verify(version), temporary / "artifacts" / version)
    body = {"aliases": dict(release.aliases), "router": release.router, "indexes": dict(release.indexes)}
    (temporary / "release.json").write_text(json.dumps(body, indent=1), "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def import_release(folder: Path, registry: Registry, artifacts: ArtifactStore, *, note: str) -> Release:
    """Publish what `folder` holds. Raises ArtifactCorrupt where it is not what was exported."""
    try:
        body = json.loads((folder / "release.json").read_text("utf-8"))
        cards = [card_from_dict(json.loads(path.read_text("utf-8"))) for path in sorted((folder / "cards").iterdir())]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArtifactCorrupt(
            f"{folder} is not an exported release: {error}.", hint="Install the package again."
        ) from error
    for path in sorted((folder / "artifacts").iterdir()):
        if (stored := artifacts.put(path)) != path.name:
            raise ArtifactCorrupt(f"{path} has the content hash {stored}.", hint="Install the package again.")
    return registry.publish(
        cards=cards, aliases=body["aliases"], router=body["router"], indexes=body["indexes"], note=note
    )


def _artifacts_of(release: Release, cards: list[Card]) -> list[str]:
    named = {release.router, *release.indexes.values()}
    for card in cards:
        if isinstance(card.spec, Lora):
            named.add(card.spec.adapter)
        elif isinstance(card.spec, Plugin):
            named.update(card.spec.artifacts)
    return sorted(named)
