"""A job's stages, a folder each: what is finished is on disk, and a job that is run again goes on from there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
            _sync(partial)
            partial.rename(final)
        return final, json.loads((final / "report.json").read_text("utf-8"))


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
