"""Experts that steer a black box at a server: found out, fitted, measured and registered by what the server can do."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from collegium.errors import GateRefused, InvalidRequest
from collegium.experts.home import Home
from collegium.experts.remote.demonstrations import Demonstrations
from collegium.runtime import Collegium
from collegium.schema import Card, Remote
from collegium.settings import Settings
from collegium.tests.remote_server import Model, RemoteServer, serving
from collegium.tests.test_training_pipeline import idle, silent, write
from collegium.training.plan import Plan
from collegium.training.proxies.proxy import ProxyPlan, Server, proxy_expert

MODELS = iter(range(1000))
PROBES = 20
"""Calls that finding out what a server can do costs, at most."""


@pytest.fixture(scope="module")
def server(tiny_base: Path) -> Iterator[RemoteServer]:
    with serving(Model(tiny_base)) as running:
        yield running


@pytest.fixture
def home(make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Home]:
    with Home(make_settings(tmp_path / "home", precision="float32", remote_retries=0)) as opened:
        yield opened


@pytest.fixture
def plan(tmp_path: Path, adapters: Any, server: RemoteServer, monkeypatch: pytest.MonkeyPatch) -> ProxyPlan:
    """A few short rows, and no free questions: a request a token adds up."""
    monkeypatch.setattr("collegium.training.measuring.evaluate.ANSWER_TOKENS", 8)
    monkeypatch.setattr("collegium.training.proxies.proxy.probes", lambda domain: [])
    rng = random.Random(0)

    def row(number: int) -> dict[str, Any]:
        answer = "".join(rng.choice("abcdefgh ") for _ in range(4)).strip() or "a"
        return {"prompt": f"violin {number}", "answer": answer, "source": "medquad" if number % 2 else "wine"}

    rows = [row(number) for number in range(20)]
    examples, test = write(tmp_path / "a.jsonl", rows[:10]), write(tmp_path / "b.jsonl", rows[10:])
    where = Server(server.url, f"tiny-{next(MODELS)}")
    return ProxyPlan(Plan("steered", (examples,), (test,)), adapter=adapters["law"], server=where)


def test_one_that_tells_likelihoods_is_steered(home: Home, plan: ProxyPlan, server: RemoteServer) -> None:
    shown: list[Card] = []
    with server.acting(top=5):
        card, verdicts = proxy_expert(plan, home, force=True, progress=silent, measured=shown.append)
        assert isinstance(card.spec, Remote)
        assert (card.spec.url, card.spec.mode, card.domain) == (server.url, "auto", "")
        assert card.evidence.capabilities["top_k"] == 5
        assert {"nll", "token_f1"} <= {score.metric for score in card.evidence.scores}
        assert all(set(score.beside) == {"expert alone"} for score in card.evidence.scores)
        assert set(card.evidence.recipe["fit"]["nll"]) >= {"proxy", "large", "tuned"}
        assert card.evidence.forced == (not verdicts.passed)
        assert len(Demonstrations.load(home.artifacts.verify(card.spec.demonstrations)).rows) == 10
        calls = len(server.received)
        again, _ = proxy_expert(plan, home, force=True, progress=silent)
        assert again.version == card.version
        assert len(server.received) < calls + PROBES, "it is asked what it can do, and nothing else"
        with Collegium.open(home.settings) as collegium:
            reply = collegium.chat("violin", expert="steered")
            assert reply.mode == "remote-topk"


def test_an_answer_that_is_known_is_measured_in_one_call(
    home: Home, plan: ProxyPlan, server: RemoteServer, tmp_path: Path
) -> None:
    rows = [{"prompt": f"violin {number}", "answer": "the guitar", "source": "medquad"} for number in range(10)]
    training = replace(plan.training, examples=(write(tmp_path / "c.jsonl", rows[:5]),))
    training = replace(training, test=(write(tmp_path / "d.jsonl", rows[5:]),))
    found = {}
    for prompt in ("none", "field"):
        elsewhere = Server(server.url, f"tiny-{next(MODELS)}")
        with server.acting(top=5, prompt=prompt):
            asked = replace(plan, training=training, server=elsewhere)
            card, _ = proxy_expert(asked, home, force=True, progress=silent)
            found[prompt] = card, len(server.calls())
    (singly, many), (told, few) = found.values()
    assert few < 15 + PROBES < 5 * 15 < many, "five to fit on, five of the large model, and five of the expert"
    assert [score.value for score in told.evidence.scores] == pytest.approx(
        [score.value for score in singly.evidence.scores], abs=1e-3
    )


def test_one_that_does_not_is_compared_by_what_it_says(home: Home, plan: ProxyPlan, server: RemoteServer) -> None:
    shown: list[Card] = []
    with server.acting(logprobs=False), pytest.raises(GateRefused):
        proxy_expert(plan, home, force=False, progress=silent, measured=shown.append)
    (card,) = shown
    assert {score.metric for score in card.evidence.scores} == {"exact_match", "token_f1"}
    assert "fit" not in card.evidence.recipe
    assert card.evidence.capabilities["chat"]
    assert "steered" not in home.release().aliases


def test_words_may_be_asked_for(home: Home, plan: ProxyPlan, server: RemoteServer) -> None:
    assert plan.server
    with server.acting():
        card, _ = proxy_expert(
            replace(plan, server=replace(plan.server, mode="text")), home, force=True, progress=silent
        )
        assert not server.calls(), "nobody asked for log-probabilities"
        with Collegium.open(home.settings) as collegium:
            assert collegium.chat("violin", expert="steered").mode == "remote-text"
    assert isinstance(card.spec, Remote)
    assert (card.spec.mode, card.evidence.capabilities) == ("text", {})


def test_a_server_is_refused_at_once_where_it_may_not_be_asked(home: Home, plan: ProxyPlan, tmp_path: Path) -> None:
    assert plan.server
    with pytest.raises(InvalidRequest, match="remote_hosts"):
        proxy_expert(replace(plan, server=Server("https://example.com/v1", "x")), home, force=True, progress=idle)
    for change in ({"large": "elsewhere"}, {"direct": tmp_path}):
        wrong: dict[str, Any] = change
        with pytest.raises(InvalidRequest, match="at the server"):
            proxy_expert(replace(plan, **wrong), home, force=True, progress=idle)
