"""Where the benchmarks' data is, and which tasks each shipped expert is measured on."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

TASKS = {
    "finance": ("banking77", "tatqa"),
    "code": ("nl2bash",),
    "law": ("unfair_tos", "privacyqa", "legalbench"),
    "health": ("pubmedqa", "medmcqa", "medquad"),
    "science": ("arc_easy", "arc_challenge", "openbookqa"),
    "math": ("mawps", "gsm8k"),
    "general": ("boolq", "nq_open"),
}
"""Domain -> tasks, the files `experts/<domain>/<task>.{train,test}.jsonl.gz` of the data folder."""
TRAINED_ON = {"finance": 4000, "code": 2000, "law": 1000, "health": 350, "science": 1000, "math": 1000, "general": 350}
"""Rows of each task that the shipped experts, and the adapter that they are compared with, were trained on, at most."""


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("COLLEGIUM_DATA", Path(__file__).parent.parent.parent / "shared" / "data")),
        help="folder of the data (docs/examples.md); default: COLLEGIUM_DATA",
    )
    options.add_argument("--quick", action="store_true", help="fewer rows: minutes instead of an hour")
    options.add_argument("--json", type=Path, help="write the figures here too")
    return options


def need(folder: Path) -> Path:
    """The folder, or an end with a sentence that says what to do."""
    if not folder.is_dir():
        sys.exit(
            f"{folder} does not exist. Name the data with --data or COLLEGIUM_DATA (docs/examples.md says its form)."
        )
    return folder


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a gzipped JSON-lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
