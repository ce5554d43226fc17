"""The commands about the router: why it decides as it does, what it knows, fitting and refitting it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from collegium.cli import app
from collegium.cli_router import fit_router
from collegium.errors import ArtifactCorrupt, InvalidRequest
from collegium.experts.home import Home
from collegium.router.artifact import RouterArtifact
from collegium.router.rows import BACKGROUND, Rows
from collegium.runtime import Collegium
from collegium.settings import Settings
from collegium.tests.encoder_models import tiny_encoder_of
from collegium.training.domain import store_router
from collegium.training.routing.tune_encoder import Tuning

DOMAINS = ("code", "health", "law", "math")
HOSTILE = "the [red]guitar[/red] \x1b[31m\x9b31m\u202e and a violin"


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def reading(tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands read the home that tests only read."""
    monkeypatch.setenv("COLLEGIUM_HOME", str(tiny_settings.home))


@pytest.fixture
def home(fresh_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """Commands work on this home, which is the test's own."""
    monkeypatch.setenv("COLLEGIUM_HOME", str(fresh_settings.home))
    with Home(fresh_settings) as opened:
        yield opened


def artifact_of(home: Home) -> RouterArtifact:
    return RouterArtifact.load(home.artifacts.verify(home.release().router))


def test_a_decision_is_explained(reading: None, collegium: Collegium, prompts: Mapping[str, str]) -> None:
    found = collegium.explain(prompts["law"])
    first, *shown = invoke("route", "--explain", prompts["law"]).splitlines()
    assert first == prompts["law"]
    assert shown[0] == "law · the router chose it"
    assert shown[1] == f"  {' or '.join(found.scores.prediction_set)}, 90 %"
    assert shown[2] == (
        f"  more familiar than {100 * found.scores.confidence:.3g} % of known prompts; "
        "fewer than 5 % would fit no domain"
    )
    assert shown[3].split("; ")[1] == (f"cosine of the nearest {found.views[1]:.2f}, typically {found.typical[1]:.2f}")
    headings = [line for line in shown[4:] if not line.startswith("    ")]
    likeliest = sorted(DOMAINS, key=lambda domain: -found.scores.probabilities[domain])
    assert [line.split()[0] for line in headings] == [
        domain for rank, domain in enumerate(likeliest) if rank < 3 or found.scores.probabilities[domain] >= 0.01
    ]
    assert headings[0].endswith(f" {found.scores.probabilities['law']:.2f}")
    nearest = found.nearest["law"][0]
    assert shown[5].split() == [f"{nearest.cosine:.2f}", nearest.source, nearest.id]
    assert len(shown) == 4 + len(headings) * (1 + len(found.nearest["law"]))


def test_a_prompt_of_no_domain_is_explained(reading: None, prompts: Mapping[str, str]) -> None:
    shown = invoke("route", "--explain", prompts["unknown"])
    assert "base · no domain fits, so the fallback answers\n" in shown
    (body,) = [json.loads(line) for line in invoke("route", "--explain", "--json", prompts["unknown"]).splitlines()]
    assert body["domain"] is None
    assert body["confidence"] < body["threshold"]


def test_an_explanation_as_json_holds_everything(
    reading: None, collegium: Collegium, prompts: Mapping[str, str]
) -> None:
    asked = [prompts["law"], prompts["code"]]
    bodies = [json.loads(line) for line in invoke("route", "--explain", "--json", *asked).splitlines()]
    plain = [json.loads(line) for line in invoke("route", "--json", *asked).splitlines()]
    for prompt, body, decision in zip(asked, bodies, plain, strict=True):
        found = collegium.explain(prompt)
        assert decision.items() <= body.items()
        assert body["coverage"] == 0.9
        assert list(body["nearest"]) == list(found.nearest)
        assert {one["source"] for one in body["nearest"]["law"]} == {"made-up:law"}
        assert [one["text"] for one in body["nearest"]["law"]] == [None] * 3
        assert list(body["views"]) == ["logit", "cosine", "agreement"]
        for view, value, typical in zip(body["views"].values(), found.views, found.typical, strict=True):
            assert view == {"value": pytest.approx(value, abs=1e-4), "typical": pytest.approx(typical, abs=1e-4)}
        assert body["background"] == []


def test_texts_of_a_users_own_domain_are_shown_and_obeyed_by_no_terminal(home: Home, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{HOSTILE}\n{'guitar ' * 100}\n", "utf-8")
    invoke("experts", "add", "music", "--examples", tmp_path / "prompts.txt")
    shown = invoke("route", "--explain", "the guitar and a violin \x1b[31m")
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert '"the [red]guitar[/red] [31m 31m and a violin"' in shown
    assert max(map(len, shown.splitlines())) < 200
    raw = invoke("route", "--explain", "--json", "the guitar and a violin")
    assert raw.isascii()
    assert HOSTILE in {one["text"] for one in json.loads(raw)["nearest"]["music"]}
    assert {one["source"] for one in json.loads(raw)["nearest"]["music"]} == {"user:music"}


@pytest.fixture
def with_background(home: Home) -> Home:
    """The live router has stored prompts of no domain."""
    artifact = artifact_of(home)
    near = artifact.rows.embeddings[:4]
    added = Rows(near, (BACKGROUND,) * 4, ("chat\x1b",) * 4, ("1", "2", "3", "4"), (None,) * 4)
    measured = {"accuracy": {"law/other": 0.75, "mean": 0.75}}
    changed = replace(artifact, rows=artifact.rows.plus(added), provenance=measured)
    home.registry.publish(router=store_router(home, changed), note="with a background")
    return home


def test_stored_prompts_of_no_domain_are_told_apart(with_background: Home, prompts: Mapping[str, str]) -> None:
    shown = invoke("route", "--explain", prompts["law"]).splitlines()
    assert shown[-4] == "  of no domain"
    assert [line.split()[1] for line in shown[-3:]] == ["chat"] * 3
    body = json.loads(invoke("route", "--explain", "--json", prompts["law"]))
    assert set(body["nearest"]) == set(DOMAINS)
    assert [one["source"] for one in body["background"]] == ["chat\x1b"] * 3


def test_a_router_is_shown(with_background: Home) -> None:
    artifact = artifact_of(with_background)
    version = with_background.release().router[:12]
    shown = [line.rstrip() for line in invoke("router", "show").splitlines()]
    assert shown[0] == f"{version} · encoder {artifact.encoder}"
    assert shown[1] == "threshold 0.05: what is less familiar than 95 % of known prompts fits no domain"
    assert shown[2] == "prediction sets hold the right domain of 90 % of prompts"
    cells = [line.split() for line in shown]
    assert cells[5:9] == [[domain, f"made-up:{domain}", "128"] for domain in DOMAINS]
    assert cells[9] == ["of", "no", "domain", "chat", "4"]
    assert cells[-2:] == [["law/other", "0.750"], ["mean", "0.750"]]
    body = json.loads(invoke("router", "show", "--json"))
    assert (body["version"], body["encoder"], body["adapter"]) == (version, artifact.encoder, False)
    assert (body["threshold"], body["coverage"], body["temperature"]) == (0.05, 0.9, 1.0)
    assert body["domains"] == list(DOMAINS)
    assert {"domain": None, "source": "chat\x1b", "rows": 4} in body["rows"]
    assert sum(row["rows"] for row in body["rows"]) == len(artifact.rows)
    assert body["provenance"] == artifact.provenance


def test_a_router_of_which_nothing_was_measured_is_shown(reading: None) -> None:
    assert "accuracy" not in invoke("router", "show")


def test_a_new_domain_refits_the_router(home: Home) -> None:
    before = home.release()
    told = invoke("experts", "add", "music", "--description", "Guitars and violins.")
    live = home.release()
    assert told == (
        f"{home.cards(live)['music'].version} is live.\nThe router's head was refitted: release {live.id}.\n"
    )
    assert home.registry.releases()[0].note == "refit the router's head"
    assert live.id == before.id + 2
    settled = artifact_of(home)
    np.testing.assert_array_equal(settled.head.weights, settled.refitted().head.weights)
    again = invoke("experts", "add", "music", "--description", "Guitars.")
    assert again == f"{home.cards(home.release())['music'].version} is live.\n", "the router knows the domain"
    assert home.release().router == live.router


def test_a_new_domain_may_leave_the_others_as_they_were(home: Home) -> None:
    before = artifact_of(home).head
    told = invoke("experts", "add", "music", "--description", "Guitars and violins.", "--no-refit")
    assert told == f"{home.cards(home.release())['music'].version} is live.\n"
    after = artifact_of(home).head
    kept = [place for place, domain in enumerate(after.domains) if domain != "music"]
    np.testing.assert_array_equal(after.weights[kept], before.weights)
    refitted = invoke("router", "refit")
    assert refitted == f"The router's head was refitted: release {home.release().id}.\n"
    settled = artifact_of(home)
    assert settled.head.domains == after.domains
    assert not np.array_equal(settled.head.weights[kept], before.weights)


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[], tuple[object, ...]]:
    """A function to the options that name rows to fit on."""
    texts = {"law": "the court and the contract", "health": "the doctor and a fever"}

    def write() -> tuple[object, ...]:
        files: dict[str, Path] = {}
        for source in ("train", "dev"):
            found = [
                {"text": f"{text} {number}", "domain": domain, "source": f"{source}-{domain}"}
                for domain, text in texts.items()
                for number in range(6)
            ]
            files[source] = tmp_path / f"{source}.jsonl"
            files[source].write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")
        return ("--train", files["train"], "--dev", files["dev"])

    return write


def fitted(*arguments: object) -> tuple[dict[str, float], str]:
    """What `router fit` measured, and what it said then."""
    accuracy, _, said = invoke("router", "fit", *arguments).partition("}\n")
    measured: dict[str, float] = json.loads(f"{accuracy}}}")
    return measured, said


def test_the_encoder_is_tuned_unless_it_is_to_stay(home: Home, rows: Callable[[], tuple[object, ...]]) -> None:
    measured, said = fitted(*rows(), "--steps", 2, "--rank", 2, "--learning-rate", 0.001)
    assert set(measured) == {"law/dev-law", "health/dev-health", "mean"}
    assert said == f"Release {home.release().id} is live.\n"
    body = json.loads(invoke("router", "show", "--json"))
    tuned = body["provenance"]["tuning"]
    assert (tuned["steps"], tuned["rank"], tuned["learning_rate"]) == (2, 2, 0.001)
    assert body["adapter"]
    assert invoke("router", "show").splitlines()[0].endswith(" with an adapter")
    assert json.loads(invoke("route", "--json", "the court and the contract"))["domain"] in ("law", "health", None)
    fitted(*rows(), "--no-tune")
    body = json.loads(invoke("router", "show", "--json"))
    assert not body["adapter"]
    assert "tuning" not in body["provenance"]


@pytest.mark.parametrize("kind", ["ModernBert", "DebertaV2"])
def test_another_backbone(
    home: Home,
    rows: Callable[[], tuple[object, ...]],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / kind
    tiny_encoder_of(kind, folder)
    monkeypatch.chdir(tmp_path)
    _, said = fitted(*rows(), "--backbone", f"./{kind}", "--steps", 2, "--rank", 2)
    assert said.splitlines() == [
        f"Release {home.release().id} is live.",
        f'Nothing can open its router until you set encoder = "{folder}" in collegium.toml.',
    ]
    with pytest.raises(ArtifactCorrupt, match="was fitted on the encoder"):
        invoke("route", "--json", "the court")
    monkeypatch.setenv("COLLEGIUM_ENCODER", str(folder))
    body = json.loads(invoke("route", "--explain", "--json", "the court"))
    assert set(body["probabilities"]) == {"law", "health"}
    _, said = fitted(*rows(), "--backbone", folder, "--no-tune")
    assert said == f"Release {home.release().id} is live.\n", "it is set already"


def test_documents_that_another_backbone_cannot_search_are_named(
    home: Home, rows: Callable[[], tuple[object, ...]], tmp_path: Path
) -> None:
    (tmp_path / "song.txt").write_text("The guitar and the violin by the river.", "utf-8")
    invoke("experts", "add", "music", "--docs", tmp_path / "song.txt", "--no-refit")
    tiny_encoder_of("DistilBert", tmp_path / "other")
    _, said = fitted(*rows(), "--backbone", tmp_path / "other", "--no-tune")
    assert said.splitlines()[-1] == "Then add the documents of music again: no index is searched else."


def test_what_is_no_backbone_is_a_sentence(home: Home, rows: Callable[[], tuple[object, ...]]) -> None:
    live = home.release().id
    with pytest.raises(InvalidRequest, match="'nothing' is not the name of a model"):
        invoke("router", "fit", *rows(), "--backbone", "nothing")
    assert home.release().id == live


def test_the_defaults_of_the_command_are_those_of_tuning() -> None:
    defaults: dict[str, Any] = {
        name: parameter.default for name, parameter in inspect.signature(fit_router).parameters.items()
    }
    tuning = Tuning()
    assert {name: defaults[name] for name in ("steps", "rank", "learning_rate")} == {
        "steps": tuning.steps,
        "rank": tuning.rank,
        "learning_rate": tuning.learning_rate,
    }
