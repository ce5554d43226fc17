"""Past decisions under another router, and the commands that show them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from collegium.cli import app
from collegium.errors import InvalidRequest
from collegium.experts.decisions import DecisionLog, Logged
from collegium.experts.home import Home
from collegium.router.artifact import RouterArtifact
from collegium.router.head import Floats
from collegium.router.policy import Scores
from collegium.router.replay import Past, replay
from collegium.schema import Decision

if TYPE_CHECKING:
    from pathlib import Path

    from collegium.settings import Settings


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    decision: Decision
    embedding: Floats
    encoder: str = "bert"
    domains: tuple[str, ...] | None = None


def measured(domain: str, *, known: bool = True, then: Mapping[str, float], **more: Any) -> Measured:
    """A decision whose embedding says what the other router will find: 1 at the place of the domain, in `DOMAINS`."""
    embedding = np.asarray([name == domain for name in DOMAINS], np.float32) * (1.0 if known else 0.1)
    best = max(then.values())
    was = Decision("x", (("e", 1.0),), then, (), best, "sticky", 0.5, "old")
    return Measured(was, embedding, **more)


DOMAINS = ("law", "code", "tax")


def score(embeddings: Floats) -> list[Scores]:
    return [
        Scores(one, dict(zip(DOMAINS, map(float, one), strict=True)), (), float(one.max()), 0.5, "new")
        for one in embeddings
    ]


def test_changes_are_counted_most_first() -> None:
    law = {"law": 0.9, "code": 0.1}
    past: list[Past] = [
        measured("law", then=law),
        measured("law", known=False, then={"law": 0.4, "code": 0.3}),
        measured("law", known=False, then=law),
        measured("tax", then=law),
        measured("tax", then=law),
        measured("code", then={"law": 0.4, "code": 0.3}),
        measured("law", then=law, encoder="other"),
    ]
    result = replay(past, "bert", score)
    assert result.same == 2
    assert list(result.changes.items()) == [(("law", "tax"), 2), (("law", None), 1), ((None, "code"), 1)]
    assert result.elsewhere == {"other": 1}


def test_a_choice_that_was_limited_stays_limited() -> None:
    limited = measured("tax", then={"code": 0.8, "law": 0.2}, domains=("code", "law"))
    limited = replace(limited, embedding=np.asarray([0.2, 0.3, 0.9], np.float32))
    assert replay([limited], "bert", score).same == 1
    gone = replace(limited, domains=("sports",))
    assert replay([gone], "bert", score).changes == {("code", None): 1}


def test_nothing_to_replay_asks_nobody() -> None:
    def nobody(embeddings: Floats) -> list[Scores]:
        raise AssertionError

    past = [measured("law", then={"law": 1.0}, encoder="other")]
    result = replay(past, "bert", nobody)
    assert (result.same, result.changes, result.elsewhere) == (0, {}, {"other": 1})


@pytest.fixture
def home(fresh_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.setenv("COLLEGIUM_HOME", str(fresh_settings.home))
    with Home(fresh_settings) as opened:
        yield opened


NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)  # in the future, so that it is never too old


@pytest.fixture
def full(home: Home) -> Home:
    """A home with a log: the live router's own verdicts on 4 rows, a wrong one, and one of another encoder."""
    release = home.release()
    artifact = RouterArtifact.load(home.artifacts.path(release.router))
    places = [artifact.rows.domains.index(domain) for domain in ("law", "code", "health", "math")]
    embeddings = artifact.rows.embeddings[places]
    with closing(DecisionLog(home.registry, keep_text=True, days=30)) as log:
        for hour, scores in enumerate(artifact.scores(embeddings, "r")):
            log.put(_logged(artifact.encoder, scores, NOON + timedelta(hours=hour)))
        law, *_ = artifact.scores(embeddings, "r")
        wrong = replace(law, probabilities={"code": 0.9, "law": 0.1})
        log.put(_logged(artifact.encoder, wrong, NOON + timedelta(hours=4)))
        log.put(_logged("another", law, NOON + timedelta(hours=5), "[red]\x1b[31m very\nlong" + "g" * 90))
    return home


def _logged(encoder: str, scores: Scores, created: datetime, text: str = "a question") -> Logged:
    decision = Decision(
        scores.domain if scores.known else None,
        (("law", 1.0),),
        scores.probabilities,
        scores.prediction_set,
        scores.confidence,
        "routed",
        scores.threshold,
        "r",
    )
    return Logged(decision, scores.embedding, encoder, 1, text, created)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["decisions", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_an_empty_log_says_so(home: Home) -> None:
    assert invoke("list") == "No decision is in the log.\n"
    assert invoke("list", "--json") == ""
    assert ": 0 of 0 decisions would be the same." in invoke("replay")


def test_list_shows_the_newest_first_on_a_line_each(full: Home) -> None:
    shown = invoke("list", "--last", "2").splitlines()
    assert shown[0].split()[:2] == ["when", "(UTC)"]
    assert [line[:19] for line in shown[1:3]] == ["2030-01-01 17:00:00", "2030-01-01 16:00:00"]
    assert len(shown) == 3
    assert "\x1b" not in shown[1]
    assert " [red] [3" in shown[1]
    assert shown[1].endswith("…")
    assert all(len(line) <= 80 for line in shown)


def test_list_as_json_has_every_field(full: Home) -> None:
    found = [json.loads(line) for line in invoke("list", "--json", "--domain", "law").splitlines()]
    assert {one["domain"] for one in found} == {"law"}
    newest = found[0]
    assert newest["created"] == "2030-01-01T17:00:00.000+00:00"
    assert newest["encoder"] == "another"
    assert newest["expert"] == "law"
    assert len(newest["prompt_hash"]) == 64
    assert newest["text"].startswith("[red]")
    late = invoke("list", "--json", "--since", "2030-01-01 15:00:00").splitlines()
    assert len(late) == 3


def test_a_prompt_that_is_not_kept_is_shown_by_its_hash(home: Home) -> None:
    scores = Scores(np.ones(4, np.float32), {"law": 1.0}, ("law",), 1.0, 0.5, "r")
    with closing(DecisionLog(home.registry, keep_text=False, days=30)) as log:
        log.put(_logged("bert", scores, NOON))
    assert "#" in invoke("list")
    assert "a question" not in invoke("list")


def test_replay_counts_what_would_change(full: Home) -> None:
    body = json.loads(invoke("replay", "--json"))
    assert body == {
        "router": full.release().router[:12],
        "replayed": 5,
        "same": 4,
        "changes": [{"from": "code", "to": "law", "count": 1}],
        "other_encoders": {"another": 1},
    }
    shown = invoke("replay").splitlines()
    assert shown[0] == f"Router {body['router']}: 4 of 5 decisions would be the same."
    assert [line.split() for line in shown[1:3]] == [["from", "to", "decisions"], ["code", "law", "1"]]
    assert shown[3] == "Not replayed, because they rest on another encoder (another): 1."
    assert json.loads(invoke("replay", "--json", "--last", "2"))["replayed"] == 1


def test_a_router_is_named_by_its_release_or_version(full: Home, tmp_path: Path) -> None:
    before = full.release()
    artifact = RouterArtifact.load(full.artifacts.path(before.router))
    folder = tmp_path / "router"
    folder.mkdir()
    reversed_head = replace(artifact.head, weights=-artifact.head.weights)
    replace(artifact, head=reversed_head).save(folder)
    after = full.registry.publish(router=full.artifacts.put(folder), note="the wrong way round")

    def replayed(*arguments: str) -> str:
        return str(json.loads(invoke("replay", "--json", *arguments))["router"])

    assert replayed() == replayed("--router", str(after.id)) == after.router[:12]
    for name in (str(before.id), before.router, before.router[:6]):
        assert replayed("--router", name) == before.router[:12]
    for name in ("99", before.router[:5], "x" * 12):
        with pytest.raises(InvalidRequest, match="neither a release nor a router") as caught:
            invoke("replay", "--router", name)
        assert before.router[:12] in (caught.value.hint or "")
