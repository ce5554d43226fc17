"""From examples to a live expert that steers another model: fitted, measured beside its parts, let through or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from collegium.cli_training import proxy
from collegium.console import show_card
from collegium.errors import ArtifactCorrupt, ContextTooLong, GateRefused, InvalidRequest, NameTaken
from collegium.experts.combination import formula
from collegium.experts.engine.request import BASE, Request, Row
from collegium.experts.engine.slots import Adapter
from collegium.experts.home import Home
from collegium.experts.kinds import closing_host
from collegium.experts.shrunk import Shrunk
from collegium.runtime import Collegium
from collegium.schema import ARTIFACT, Card, Combination, Message, Proxy, Sampling, Score, card_from_dict, card_to_dict
from collegium.settings import Settings
from collegium.tests.engine_doubles import collect
from collegium.tests.engine_models import tiny_lora
from collegium.tests.test_training_pipeline import idle, silent, write
from collegium.training import recipes
from collegium.training.measuring.gate import Verdicts
from collegium.training.plan import Plan
from collegium.training.proxies.proxy import ProxyPlan, proxy_expert, set_aside
from collegium.training.tuning.bench import Bench
from collegium.training.watch import Progress

SHOWN = "explain the contract of the plaintiff"
TRUTH = Combination("proxy", 1.0)
EXPERT_ALONE = Combination("mixture", 1.0)


@dataclass(frozen=True)
class World:
    """A home in float32, a small model of one layer in its store, an adapter for it, and rows that were written by a formula."""

    settings: Settings
    small: str
    adapter: Path
    folder: Path

    def plan(self, name: str, truth: Combination, **changes: Any) -> ProxyPlan:
        examples, test = (self.folder / f"{truth.method}-{part}.jsonl" for part in ("examples", "test"))
        return ProxyPlan(Plan(name, (examples,), (test,), **changes), self.small, adapter=self.adapter)


@pytest.fixture(scope="module")
def world(make_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("steered")
    settings = make_settings(folder / "home", precision="float32")
    with Home(settings) as home:
        base = home.models.get(settings.base_model)
        (folder / "shrunk").mkdir()
        Shrunk(base.identity, (0,)).save(folder / "shrunk")
        small = ARTIFACT + home.artifacts.put(folder / "shrunk")
        with closing_host(home, base) as host:
            cached = host.models.cached(small)
            adapter = tiny_lora(folder / "adapter", cached.folder)
            model = host.models.open(small)
            for truth in (TRUTH, EXPERT_ALONE):
                rows = []
                for number in range(48):
                    prompt = host.chat.encode([Message("user", f"the guitar and violin {number}")])
                    tuned = Adapter("tuned", adapter)
                    all_rows = {"large": Row(prompt), "tuned": Row(prompt, tuned, model.name)}
                    all_rows |= {"untuned": Row(prompt, None, model.name)}
                    asked = formula(truth)
                    sampling = Sampling(max_tokens=12, temperature=1.0, min_tokens=12)
                    request = Request(
                        tuple(all_rows[part] for part in asked.parts), asked.combiner, sampling, seed=number
                    )
                    said = collect(host.engine.submit(request)).text
                    answer = "".join(letter for letter in said if letter.isascii() and letter.isprintable())
                    rows.append({"prompt": f"the guitar and violin {number}", "answer": answer, "source": "medquad"})
                write(folder / f"{truth.method}-examples.jsonl", rows[:24])
                write(folder / f"{truth.method}-test.jsonl", rows[24:])
    return World(settings, small, adapter, folder)


@pytest.fixture
def home(world: World) -> Iterator[Home]:
    with Home(world.settings) as opened:
        yield opened


@pytest.fixture(scope="module")
def steered(world: World) -> tuple[Card, Verdicts, list[Card]]:
    """An expert that was let through."""
    shown: list[Card] = []
    with Home(world.settings) as home:
        card, verdicts = proxy_expert(
            replace(world.plan("steered", TRUTH, description="Guitars."), method="proxy"),
            home,
            force=False,
            progress=silent,
            measured=shown.append,
        )
    return card, verdicts, shown


def test_what_beats_both_is_live_by_name(world: World, steered: tuple[Card, Verdicts, list[Card]], home: Home) -> None:
    card, verdicts, shown = steered
    assert verdicts.passed
    assert str(verdicts).startswith("better than the large model alone: +")
    assert "; better than the small expert alone: +" in str(verdicts)
    assert "wins" not in str(verdicts)
    assert isinstance(card.spec, Proxy)
    assert (card.spec.small, card.spec.large, card.domain, card.spec.identities) == (world.small, BASE, "", {})
    assert card.spec.combination.method == "proxy"
    assert card.spec.combination.alpha == pytest.approx(1, abs=0.5)
    assert home.cards(home.release())["steered"] == card == card_from_dict(json.loads(json.dumps(card_to_dict(card))))
    assert [one.version for one in shown] == [card.version]
    assert not card.evidence.forced
    assert card.evidence.canary
    fitted = card.evidence.recipe["fit"]
    assert fitted["nll"]["proxy"] < min(fitted["nll"]["large"], fitted["nll"]["tuned"])
    assert fitted["answers"] == 24


def test_the_card_has_all_who_were_measured(steered: tuple[Card, Verdicts, list[Card]]) -> None:
    scores = {(score.task, score.metric): score for score in steered[0].evidence.scores}
    nll = scores["medquad", "nll"]
    assert nll.value < min(nll.base, nll.beside["expert alone"])
    assert nll.rows == 24
    assert set(nll.beside) == {"expert alone"}
    assert ("free_questions", "in_sentences") in scores


def test_it_answers_by_name_and_the_router_is_as_it_was(
    world: World, steered: tuple[Card, Verdicts, list[Card]], home: Home
) -> None:
    first = min(home.registry.releases(), key=lambda release: release.id)
    assert home.release().router == first.router
    with Collegium.open(world.settings) as collegium:
        reply = collegium.chat(SHOWN, expert="steered")
        assert (reply.mode, reply.expert_version, reply.decision.reason) == ("proxy", steered[0].version, "explicit")
        assert reply.text != collegium.chat(SHOWN, expert="base").text
        assert collegium.chat(SHOWN, expert="steered", alpha=0.0).text == collegium.chat(SHOWN, expert="base").text
        assert collegium.route(SHOWN).expert == "law"


def test_who_does_not_beat_the_small_expert_is_refused_unless_forced(world: World, home: Home) -> None:
    plan = replace(world.plan("needless", EXPERT_ALONE), method="proxy")
    before = home.release()
    shown: list[Card] = []
    with pytest.raises(GateRefused) as caught:
        proxy_expert(plan, home, force=False, progress=silent, measured=shown.append)
    assert "needless is better than the large model alone: +" in caught.value.message
    assert "; worse than the small expert alone: -" in caught.value.message
    assert "The small expert alone wins." in caught.value.message
    assert "--force" in str(caught.value.hint)
    assert home.release() == before
    (card,) = shown
    nll = next(score for score in card.evidence.scores if score.metric == "nll")
    assert nll.beside["expert alone"] < nll.value < nll.base
    forced, verdicts = proxy_expert(plan, home, force=True, progress=idle_but_for("probing the adapter"))
    assert not verdicts.passed
    assert forced.evidence.forced
    assert forced.evidence.gate == str(verdicts)
    assert home.cards(home.release())["needless"] == forced


def test_the_command_shows_what_was_measured_of_who_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    app = typer.Typer()
    app.command()(proxy)
    monkeypatch.setenv("COLLEGIUM_HOME", str(world.settings.home))
    plan = world.plan("needless", EXPERT_ALONE)
    files = ["--examples", str(plan.training.examples[0]), "--test", str(plan.training.test[0])]
    models = ["--small", world.small, "--adapter", str(world.adapter), "--method", "proxy"]
    with pytest.raises(GateRefused):
        app(["needless", *files, *models], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "worse than the small expert alone" in shown
    assert "(forced)" not in shown
    assert "expert alone" in shown
    app(["needless", *files, *models, "--force"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "(forced)" in shown
    assert "needless@" in shown.splitlines()[-1]
    alone = ["--remote", "http://localhost:1"], ["--remote-model", "x"], ["--key-env", "X"], ["--mode", "text"]
    for wrong in alone:
        with pytest.raises(typer.BadParameter):
            app(["needless", *files, *wrong], standalone_mode=False)


def idle_but_for(*stages: str) -> Progress:
    """What is finished is not done again."""
    return lambda what, done, of: None if what in stages else idle(what, done, of)


@dataclass(frozen=True, slots=True)
class Copied:
    adapter: str = ""
    calls: str = ""


def copy(bench: Bench, material: recipes.Material, options: Copied) -> dict[str, Any]:
    """A recipe that writes an adapter that is there already."""
    with Path(options.calls).open("a") as calls:
        calls.write("called\n")
    bench.watch.progress("training", 1, 1)

    def copying(folder: Path) -> None:
        shutil.copytree(options.adapter, folder, dirs_exist_ok=True)

    bench.once("adapter", copying)
    return {"rows": len(material.tasks), "losses": [1.0]}


COPYING = recipes.Recipe(Copied, copy)


def test_a_job_that_is_run_again_goes_on(
    world: World, home: Home, adapters: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Here the small model is the base, the large one is the shrunk one, and the expert gets the domain of another."""
    monkeypatch.setitem(recipes.BUILT_IN, "copying", "tests.test_training_proxy:COPYING")
    calls = tmp_path / "calls"
    options = {"adapter": str(adapters["code"]), "calls": str(calls)}
    given = world.plan("law", TRUTH, domain="law", recipe="copying", options=options)
    plan = ProxyPlan(given.training, BASE, world.small, method="mixture", direct=world.adapter)
    told: list[str] = []

    def stop(what: str, done: int, of: int) -> None:
        told.append(what)
        if what == "measuring the small expert":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        proxy_expert(plan, home, force=True, progress=stop)
    assert {"training", "fitting", "measuring the large model", "measuring the expert"} & set(told)
    told.clear()
    card, _ = proxy_expert(plan, home, force=True, progress=lambda what, done, of: told.append(what))
    assert calls.read_text() == "called\n"
    assert not {"training", "fitting"} & set(told)
    assert isinstance(card.spec, Proxy)
    assert (card.spec.large, card.spec.small, card.domain) == (world.small, BASE, "law")
    assert card.spec.combination.method == "mixture"
    assert (card.evidence.recipe["name"], card.evidence.recipe["rows"] > 0) == ("copying", True)
    assert "losses" not in card.evidence.recipe
    assert set(card.evidence.scores[0].beside) == {"expert alone", "tuned directly"}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"method": "magic"}, InvalidRequest, "no method 'magic'"),
        ({"name": "law"}, NameTaken, "law answers for law, not for none"),
        ({"name": "Music"}, InvalidRequest, "cannot be a name"),
        ({"domain": "code"}, NameTaken, "code answers for code already"),
        ({"examples": (Path("missing.jsonl"),)}, InvalidRequest, "missing.jsonl does not exist"),
        ({"general": (Path("missing.jsonl"),), "adapter": None}, InvalidRequest, "missing.jsonl does not exist"),
        ({"general": (Path("missing.jsonl"),)}, InvalidRequest, "Nothing is trained"),
        ({"adapter": None, "recipe": "lora-xyz"}, InvalidRequest, "no recipe 'lora-xyz'"),
        ({"adapter": None}, ArtifactCorrupt, "Make one with `collegium shrink`"),
        ({"adapter": None, "small": BASE, "large": "nowhere"}, InvalidRequest, "'nowhere' is not the name of a model"),
        (
            {"adapter": None, "small": BASE, "direct": Path("nowhere")},
            InvalidRequest,
            "nowhere has no adapter_config.json",
        ),
    ],
)
def test_a_plan_that_cannot_work_is_refused_at_once(
    world: World,
    make_settings: Callable[..., Settings],
    tmp_path: Path,
    changes: dict[str, Any],
    error: type,
    said: str,
) -> None:
    plan = world.plan("music", TRUTH)
    ours = {key: value for key, value in changes.items() if key in ProxyPlan.__dataclass_fields__}
    theirs = {key: value for key, value in changes.items() if key not in ours}
    plan = replace(plan, **ours, training=replace(plan.training, **theirs))
    with Home(make_settings(tmp_path / "home")) as home, pytest.raises(error, match=said):
        proxy_expert(plan, home, force=True, progress=idle)


def test_rows_that_do_not_fit_are_named_before_anything_is_trained(world: World, home: Home, tmp_path: Path) -> None:
    row = {"prompt": "guitar " * 200, "answer": "A violin.", "id": "endless"}
    plan = world.plan("music", TRUTH)
    test = write(tmp_path / "long.jsonl", [row, {**row, "prompt": "guitar", "id": "short"}])
    plan = replace(plan, adapter=None, training=replace(plan.training, test=(test,)))
    with pytest.raises(ContextTooLong, match="1 of the rows are too long to be measured with, endless the first"):
        proxy_expert(plan, home, force=True, progress=idle)


def test_rows_to_fit_on_are_not_trained_on(world: World) -> None:
    from collegium.training.rows.examples import Example

    rows = [Example(str(number), "x", str(number), "s") for number in range(2000)]
    training, dev = set_aside(rows, 17, all_of_them=False)
    assert (len(training), len(dev)) == (1700, 300)
    assert {row.id for row in (*training, *dev)} == {row.id for row in rows}
    assert set_aside(rows, 17, all_of_them=False) == (training, dev)
    assert [len(part) for part in set_aside(rows[:20], 1, all_of_them=False)] == [16, 4]
    assert [len(part) for part in set_aside(rows[:20], 1, all_of_them=True)] == [0, 20]
    with pytest.raises(InvalidRequest, match="too few"):
        set_aside(rows[:4], 1, all_of_them=False)


def test_a_card_is_shown_with_all_columns(
    steered: tuple[Card, Verdicts, list[Card]], capsys: pytest.CaptureFixture[str]
) -> None:
    card = steered[0]
    show_card(card)
    shown = capsys.readouterr().out
    assert "expert alone" in shown
    assert "combination: proxy, alpha " in shown
    assert "gate: better than the large model alone" in shown
    assert isinstance(card.spec, Proxy)
    some = (Score("t", "nll", 1, 1, 1, 2, 9, {"a": 0.5}), Score("u", "nll", 1, 1, 1, 2, 9, {"b": 0.25}))
    able = {"top_k": 20, "echo": False}
    evidence = replace(card.evidence, scores=some, capabilities=able)
    fading = replace(card.spec, combination=Combination("proxy", 1.5, 0.5, 16))
    show_card(replace(card, evidence=evidence, spec=fading))
    shown = capsys.readouterr().out
    assert "alpha 1.50, going to 0.50 over 16 tokens" in shown
    for combination, said in (
        (
            Combination("comblm", 0.5, weights=(1.0,)),
            "comblm, learned weights of the small expert and a large model steered",
        ),
        (
            Combination("comblm", 0.0, weights=(1.0,)),
            "comblm, learned weights of the small expert and the large model\n",
        ),
        (Combination("mixture", 0.25), "mixture, 0.25 of it the small expert's"),
    ):
        show_card(replace(card, spec=replace(card.spec, combination=combination)))
        assert said in capsys.readouterr().out
    assert "the server: top_k 20\n" in shown
    heads = next(line.split() for line in shown.splitlines() if line.split()[:1] == ["task"])
    assert heads[-3:] == ["a", "b", "rows"]
