"""The first minutes of an installation, with the real models: fetched, converted, seeded, by one process or by two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.models]
ROUTE = [sys.executable, "-m", "collegium", "route", "--json", "What is a tort?"]


def start(home: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "COLLEGIUM_HOME": str(home)}
    return subprocess.Popen(ROUTE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def expert(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return str(json.loads(out)["expert"])


def test_two_processes_start_at_once_on_an_empty_home(tmp_path: Path) -> None:
    assert [expert(process) for process in [start(tmp_path / "home"), start(tmp_path / "home")]] == ["law", "law"]
    assert not list((tmp_path / "home" / "models").glob(".partial-*"))


def test_a_conversion_that_is_killed_leaves_nothing_half_made(tmp_path: Path) -> None:
    models = tmp_path / "home" / "models"
    process = start(tmp_path / "home")
    deadline = time.monotonic() + 200
    while not list(models.glob(".partial-*/ready")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(models.glob("llm-*.gguf-*/collegium.json")), "the conversion was over before it was killed"
    assert expert(start(tmp_path / "home")) == "law"
    assert not list(models.glob(".partial-*"))
