"""How long a person waits: `collegium --help`, and `collegium chat` from the process's start to its first words.

    python benchmarks/startup.py [--json FILE]

The home must have been used once, so that models are there. The import share is what a fresh interpreter needs to import the
model libraries that `chat` uses, and nothing else.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from data import parser

RUNS = 5
COLLEGIUM = [sys.executable, "-m", "collegium"]
IMPORTS = "from transformers import AutoModelForCausalLM, BertModel, LlamaForCausalLM; import peft, faiss, sqlalchemy"


def main() -> None:
    chosen = parser(__doc__ or "").parse_args()
    figures = {
        "help_s": median([*COLLEGIUM, "--help"]),
        "first_words_s": median([*COLLEGIUM, "chat", "What is a tort?", "--max-tokens", "8"]),
        "import_s": median([sys.executable, "-c", f"{IMPORTS}; print(1)"]),
        "runs": RUNS,
    }
    for name, value in figures.items():
        print(f"{name:<16}{value:>8.2f}" if isinstance(value, float) else f"{name:<16}{value:>8}")
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1), "utf-8")


def median(command: Sequence[str]) -> float:
    """Median wall seconds from the start of the process to its first byte on standard output; the first run warms up."""
    return round(statistics.median([first_byte(command) for _ in range(RUNS + 1)][1:]), 3)


def first_byte(command: Sequence[str]) -> float:
    """Seconds from the start of the process to its first byte."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:  # noqa: S603
        assert process.stdout is not None
        process.stdout.read(1)
        taken = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed; run it by hand to see why.")
    return taken


if __name__ == "__main__":
    main()
