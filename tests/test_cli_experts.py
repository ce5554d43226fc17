"""The commands of an expert's life as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from collegium.experts.home import Home
from collegium.settings import Settings
from collegium.tests.test_cli import Result, Run, run  # noqa: F401
from collegium.training.domain import NewDomain
from collegium.training.register import register

COMMANDS = ("list", "show", "add", "remove", "retire", "rollback", "verify", "diff", "export", "import")


@pytest.fixture
def home(fresh_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.setenv("COLLEGIUM_HOME", str(fresh_settings.home))
    with Home(fresh_settings) as opened:
        yield opened


@pytest.fixture
def second(home: Home, adapters: Mapping[str, Path]) -> str:
    """Another version of law, which is live."""
    return register(home, NewDomain("law"), adapter=adapters["code"], progress=lambda *_: None).version


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run: Run, command: str) -> None:  # noqa: F811
    result = run("experts", command, "--help")
    assert (result.status, result.err) == (0, "")


def test_back_and_out_of_service_and_in_again(run: Run, home: Home, second: str) -> None:  # noqa: F811
    first = next(one for one in home.registry.releases() if one.id == 1).aliases["law"]
    number = home.release().id
    assert run("experts", "rollback", "law") == Result(
        0, f"{first} is live instead of {second} (release {number + 1}).\n", ""
    )
    said = run("experts", "retire", "law")
    assert said.out == (f"law is retired (release {number + 2}); `collegium experts rollback law` brings it back.\n")
    assert "law" not in home.release().aliases
    assert run("experts", "rollback", "law", second[:10]).out == f"{second} is live again (release {number + 3}).\n"
    wrong = run("experts", "rollback", "law", "law@000000")
    assert (wrong.status, wrong.out) == (1, "")
    assert wrong.said.endswith(f"Versions of law, the oldest first: {first}, {second}.")


def test_verify_says_what_is_wrong_and_ends_with_status_1(run: Run, home: Home, second: str) -> None:  # noqa: F811
    good = run("experts", "verify")
    assert (good.status, good.err) == (0, "")
    assert [line.split()[-1] for line in good.out.splitlines() if line.split()[0] == second] == ["ok"]
    path = home.artifacts.path(home.registry.card(second).spec.artifacts[0]) / "adapter_config.json"
    path.write_text(path.read_text("utf-8") + " ", "utf-8")
    bad = run("experts", "verify", "law", "code")
    assert bad.status == 1
    assert "wrong" in bad.out
    assert bad.err.startswith(f"{second}: The artifact ")
    assert "adapter_config.json has changed" in bad.err
    body = json.loads(run("experts", "verify", "law", "--json").out)
    assert [(one["kind"], one["checks"]) for one in body] == [("lora", {"card": True, "files": False})]


def test_diff_shows_cards_scores_and_adapters(run: Run, home: Home, second: str) -> None:  # noqa: F811
    first = next(one for one in home.registry.releases() if one.id == 1).aliases["law"]
    shown = run("experts", "diff", first, "law")
    assert shown.status == 0
    assert "cosine similarity of what they add" in shown.out
    assert shown.out.count("layers.") == 10
    body = json.loads(run("experts", "diff", "base", "law", "--json").out)
    assert [card["version"] for card in body["cards"]] == [home.release().aliases["base"], second]
    assert len(body["deltas"]["modules"]) == 14
    assert "Nothing to compare" in run("experts", "diff", "base", "base").out


def test_export_and_import(run: Run, home: Home, second: str, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "out"
    assert run("experts", "export", "law", folder, "--gguf") == Result(0, f"Wrote {second} to {folder}.\n", "")
    assert (folder / "adapter.gguf").is_file()
    nothing = run("experts", "export", "base", tmp_path / "none")
    assert nothing.said.startswith("collegium: base@")
    assert "has no adapter of the base model" in nothing.said
    assert not (tmp_path / "none").exists()
    refused = run("experts", "import", folder, "--name", "tort")
    assert (refused.status, "Name --test files" in refused.said) == (1, True)
    taken = run("experts", "import", folder, "--name", "tort", "--description", "the guitar", "--force")
    assert taken.status == 0, taken.err
    assert f"{home.release().aliases['tort']} is live." in taken.out
    assert "gate: not measured (forced)" in taken.out
