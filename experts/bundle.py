"""A release as a plain folder: `release.json`, `cards/` and `artifacts/`. The project ships one, and seeds a home from it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ArtifactCorrupt, InvalidRequest
from ..schema import Card, Release, card_from_dict, card_to_dict
from .artifacts import ArtifactStore
from .registry import Registry

RELEASE = "release.json"


def export_release(folder: Path, registry: Registry, artifacts: ArtifactStore, release: Release) -> None:
    """Write `release` with everything that it names into `folder`; an earlier export there is replaced.

    Raises InvalidRequest where something else stands there, which is left alone.
    """
    folder = folder.resolve()
    if folder.exists() and not _is_export(folder):
        raise InvalidRequest(f"{folder} holds something else.", hint="Name a new folder, or an earlier export.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        _write(new, registry, artifacts, release)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)


def _is_export(folder: Path) -> bool:
    return folder.is_dir() and ((folder / RELEASE).is_file() or not any(folder.iterdir()))


def _write(folder: Path, registry: Registry, artifacts: ArtifactStore, release: Release) -> None:
    (folder / "cards").mkdir(parents=True)
    (folder / "artifacts").mkdir()
    cards = {name: registry.card(version) for name, version in release.aliases.items()}
    for name, card in cards.items():
        (folder / "cards" / f"{name}.json").write_text(json.dumps(card_to_dict(card), indent=1), "utf-8")
    for version in _artifacts_of(release.router, release.indexes, cards.values()):
        shutil.copytree(artifacts.verify(version), folder / "artifacts" / version)
    body = {"aliases": dict(release.aliases), "router": release.router, "indexes": dict(release.indexes)}
    (folder / RELEASE).write_text(json.dumps(body, indent=1), "utf-8")


def import_release(folder: Path, registry: Registry, artifacts: ArtifactStore, *, note: str) -> Release:
    """Publish what `folder` holds. Raises ArtifactCorrupt, and publishes nothing, where it is not what was exported."""
    try:
        body = json.loads((folder / RELEASE).read_text("utf-8"))
        cards = [card_from_dict(json.loads(path.read_text("utf-8"))) for path in sorted((folder / "cards").iterdir())]
        change: dict[str, Any] = {
            "aliases": dict(body["aliases"]),
            "router": str(body["router"]),
            "indexes": dict(body["indexes"]),
        }
        if lost := set(change["aliases"].values()) - {card.version for card in cards}:
            raise LookupError(f"no card for {', '.join(sorted(lost))}")
        for version in _artifacts_of(change["router"], change["indexes"], cards):
            if (stored := artifacts.put(folder / "artifacts" / version)) != version:
                raise ValueError(f"artifacts/{version} has the content hash {stored}")
    except (OSError, ValueError, LookupError, TypeError, InvalidRequest) as error:
        raise ArtifactCorrupt(
            f"{folder} is not an exported release: {error}.", hint="Install the package again."
        ) from error
    return registry.publish(cards=cards, **change, note=note)


def _artifacts_of(router: str, indexes: Mapping[str, str], cards: Iterable[Card]) -> list[str]:
    return sorted({router, *indexes.values(), *(version for card in cards for version in card.spec.artifacts)})
