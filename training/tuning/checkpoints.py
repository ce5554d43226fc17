"""Checkpoints of a training: one counts when all of it is on the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ...models.cache import sync_tree

COMPLETE = "complete.json"
"""Is written into a checkpoint when all else of it is on the disk."""


def complete(folder: Path, **said: Any) -> None:
    """Mark a checkpoint that was written to its end, with what it is to say."""
    sync_tree(folder)
    (folder / f".{COMPLETE}").write_text(json.dumps(said), "utf-8")
    (folder / f".{COMPLETE}").rename(folder / COMPLETE)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end; one that was not is removed."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            found.append((int(path.name.rpartition("-")[2]), path))
        else:
            shutil.rmtree(path)
    return max(found)[1] if found else None
