"""A job's stages, a folder each: what is finished is on disk, and a job that is run again goes on from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..models.cache import sync_tree


class Stages:
    """The stages of one job under `root`. A stage is finished when its folder has its final name."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, name: str, work: Callable[[Path], dict[str, Any] | None]) -> tuple[Path, dict[str, Any]]:
        """The stage's folder and report; `work` fills a temporary folder the first time only."""
        final = self.root / name
        if not final.exists():
            partial = self.root / f".partial-{name}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            report = work(partial)
            (partial / "report.json").write_text(json.dumps(report or {}, indent=1), "utf-8")
            sync_tree(partial)
            partial.rename(final)
        return final, json.loads((final / "report.json").read_text("utf-8"))
