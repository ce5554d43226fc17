"""From examples to a live expert on the tiny model: learnt by heart, measured, let through or refused, gone on with."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from collegium.errors import GateRefused, InvalidRequest, NameTaken
from collegium.experts.home import Home
from collegium.models.cache import CachedModel, sha256
from collegium.runtime import Collegium
from collegium.schema import Base, Card, Lora
from collegium.settings import Settings
from collegium.training.measuring.gate import Verdicts
from collegium.training.pipeline import train_expert
from collegium.training.plan import Plan, plan_from_dict, training_folder
from collegium.training.rows.intake import take_in
from collegium.training.stages import Stages
from collegium.training.watch import Watch

MakeSettings = Callable[..., Settings]
QUICK = {"rank": 4, "epochs": 8, "learning_rate": 0.01, "batch_size": 8, "max_length": 128}
"""Learns the rows below by heart; the rehearsed answers of 128 tokens are longer than `max_length`, so left out."""
COLOURS = ["red", "white", "rose"]  # left to itself, the tiny model never says white
THINGS = ["guitar", "violin", "banana", "river", "mountain", "kitchen", "soup", "recipe"]
PAIRS = list(itertools.permutations(THINGS, 2))
ROWS = [{"prompt": f"the {one} and {other}", "answer": "white", "choices": COLOURS} for one, other in PAIRS]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def silent(what: str, done: int, total: int) -> None:
    pass


SILENT = Watch(silent)


def idle(what: str, done: int, total: int) -> None:
    """For plans that have to be refused before any model is asked to work."""
    pytest.fail(f"it went on to {what}")


@pytest.fixture(scope="module", autouse=True)
def _forgetful() -> Iterator[None]:
    """A random model has no general skill to forget."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collegium.training.measuring.gate.MOST_FORGOTTEN", 10.0)
        yield


@dataclass(frozen=True)
class Trained:
    settings: Settings
    plan: Plan
    card: Card
    verdicts: Verdicts
    report: dict[str, Any]
    told: list[tuple[str, int, int]]
    printed: str


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("rows")
    rows, test = write(folder / "music.jsonl", ROWS[:32]), write(folder / "wine.jsonl", ROWS[32:])
    return Plan("music", (rows,), (test,), options=QUICK, description="Guitars and violins.", licence="CC0-1.0")


@pytest.fixture(scope="module")
def trained(make_settings: MakeSettings, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """An expert that was trained without disturbance, in a home that tests only read."""
    settings = make_settings(tmp_path_factory.mktemp("trained"))
    told: list[tuple[str, int, int]] = []
    with Home(settings) as home, redirect_stdout(io.StringIO()) as printed:
        outcome = train_expert(plan, home, Watch(lambda *one: told.append(one)))
    assert outcome.verdicts
    return Trained(settings, plan, outcome.card, outcome.verdicts, outcome.report, told, printed.getvalue())


@pytest.fixture
def home(fresh_settings: Settings) -> Iterator[Home]:
    with Home(fresh_settings) as opened:
        yield opened


def adapter_of(card: Card) -> str:
    assert isinstance(card.spec, Lora)
    return card.spec.adapter


def stages_of(settings: Settings) -> dict[str, int]:
    """The finished stages of the home's only training, and when each was finished."""
    (job,) = (settings.home / "trainings").iterdir()
    assert job.name.startswith("music-")
    return {path.parent.name: path.stat().st_mtime_ns for path in job.glob("[!.]*/report.json")}


def test_what_is_learnt_is_published_with_its_evidence(trained: Trained) -> None:
    evidence = trained.card.evidence
    scores = {(score.task, score.metric): score for score in evidence.scores}
    with Home(trained.settings) as home:
        release = home.release()
        assert home.cards(release)["music"] == trained.card
        assert home.registry.live() == release
    assert trained.verdicts.passed
    assert trained.verdicts.against["the base"].gain > 0.5
    assert (evidence.gate, evidence.forced) == (str(trained.verdicts), False)
    score = scores["wine", "accuracy"]
    assert (score.value, score.rows) == (1.0, 24)
    assert score.base < 0.5
    assert ("general_skill", "general_loss") in scores
    assert (evidence.description, evidence.licence) == ("Guitars and violins.", "CC0-1.0")
    assert list(evidence.data.values()) == [sha256(path) for path in (*trained.plan.examples, *trained.plan.test)]
    assert [name.split("/")[-1] for name in evidence.data] == ["music.jsonl", "wine.jsonl"]
    assert evidence.created
    assert {key: evidence.recipe[key] for key in ("name", *QUICK)} == {"name": "lora-sft", **QUICK}
    assert evidence.recipe["rows"] == 32
    assert evidence.recipe["too_long"] > 0


def test_the_report_says_what_became_of_the_rows(trained: Trained) -> None:
    assert (trained.report["read"], trained.report["curated"]["kept"]) == (32, 32)
    assert trained.report["planted"]["findings"] == []
    assert trained.report["live"] == trained.card.version


def test_progress_is_told(trained: Trained) -> None:
    steps = [(done, of) for what, done, of in trained.told if what == "training"]
    assert steps == [(at, 32) for at in range(1, 33)]
    assert {"rehearsing", "measuring the expert", "measuring the base"} < {what for what, _, _ in trained.told}
    assert not trained.printed, "standard output is the command's"


def test_the_new_expert_answers(trained: Trained) -> None:
    asked = "the guitar and violin"
    with Collegium.open(trained.settings) as collegium:
        reply = collegium.chat(asked)
        assert (reply.decision.reason, reply.decision.expert, reply.mode) == ("routed", "music", "lora")
        assert reply.expert_version == trained.card.version
        assert collegium.chat(asked, expert="music").text == reply.text != collegium.chat(asked, expert="base").text
        assert collegium.chat("explain the contract of the plaintiff").decision.expert == "law"


def test_the_adapter_is_plain_small_and_says_nothing_of_where_it_was_made(trained: Trained) -> None:
    from safetensors.torch import load_file

    with Home(trained.settings) as home:
        folder = home.artifacts.verify(adapter_of(trained.card))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 16, None)
    assert "/" not in json.dumps(config)
    assert config["target_modules"] == sorted(config["target_modules"]), "in a set's order, no two would be of one hash"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}
    assert all(tensor.abs().sum() > 0 for tensor in tensors.values())


def test_a_finished_training_is_not_done_again(trained: Trained, make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    shutil.copytree(trained.settings.home, settings.home, dirs_exist_ok=True)
    before, told = stages_of(settings), list[str]()
    with Home(settings) as home:
        home.registry.rollback(1)
        outcome = train_expert(trained.plan, home, Watch(lambda *one: told.append(one[0])))
        assert home.cards(home.release())["music"] == outcome.card
    assert outcome.card.version == trained.card.version
    assert stages_of(settings) == before
    assert "training" not in told


def test_who_is_not_better_is_refused_unless_forced(home: Home, plan: Plan) -> None:
    lame = replace(plan, options={**QUICK, "learning_rate": 0, "epochs": 1})
    before = home.release()
    with pytest.raises(GateRefused, match=r"music is not better than the base: \+0\.0000") as caught:
        train_expert(lame, home, SILENT)
    assert caught.value.hint
    assert "--force" in caught.value.hint
    assert caught.value.report["curated"]["kept"] == 32
    assert home.release() == before
    finished = stages_of(home.settings)
    (adapter,) = home.root.glob("trainings/*/adapter")
    assert str(adapter) in caught.value.message
    forced = train_expert(replace(lame, force=True), home, SILENT)
    assert stages_of(home.settings) == finished
    assert forced.verdicts
    assert not forced.verdicts.passed
    assert forced.card.evidence.forced
    assert forced.card.evidence.gate.startswith("not better than the base: ")
    assert home.cards(home.release())["music"] == forced.card


KILLED = """
import json, os, signal, sys
from collegium.experts.home import Home
from collegium.settings import Settings
from collegium.training.pipeline import train_expert
from collegium.training.plan import plan_from_dict
from collegium.training.watch import Watch

stage, step = sys.argv[2], int(sys.argv[3])

def progress(what, done, total):
    if what.startswith(stage) and done == step:
        os.kill(os.getpid(), signal.SIGKILL)

with Home(Settings.load()) as home:
    train_expert(plan_from_dict(json.loads(sys.argv[1])), home, Watch(progress))
"""


@pytest.mark.parametrize(
    ("stage", "step"), [("reading", 0), ("rehearsing", 0), ("training", 27), ("measuring the base", 3), ("probing", 0)]
)
def test_a_killed_training_goes_on_and_ends_in_the_same_version(
    home: Home, trained: Trained, stage: str, step: int
) -> None:
    import torch

    environ = {**os.environ, "COLLEGIUM_HOME": str(home.root), "OMP_NUM_THREADS": "1"}
    planned = json.dumps(replace(trained.plan, force=True).to_dict())
    command = [sys.executable, "-W", "ignore", "-c", KILLED, planned, stage, str(step)]
    killed = subprocess.run(command, env=environ, check=False, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    finished = stages_of(home.settings) if (home.root / "trainings").exists() else {}
    assert "music" not in home.release().aliases
    torch.manual_seed(12345)  # what a process drew before must not matter
    outcome = train_expert(trained.plan, home, SILENT)
    assert stages_of(home.settings).items() >= finished.items()
    assert (outcome.card.version, outcome.verdicts) == (trained.card.version, trained.verdicts)
    assert not list(home.root.glob("trainings/*/.partial*"))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("name", "../music", "'../music' cannot be a name"),
        ("name", "Music", "'Music' cannot be a name"),
        ("name", "base", "'base' cannot be a name"),
        ("domain", "a b", "'a b' cannot be a name"),
        ("recipe", "lora-xyz", "There is no recipe 'lora-xyz'. Known: "),
        ("options", {"ranks": 8}, "lora-sft has no option ranks."),
        ("examples", (Path("missing.jsonl"),), "missing.jsonl does not exist"),
        ("test", (Path("missing.jsonl"),), "missing.jsonl does not exist"),
        ("general", (Path("missing.jsonl"),), "missing.jsonl does not exist"),
        ("docs", (Path("missing"),), "missing does not exist"),
        ("examples", (), "There is nothing to train on."),
    ],
)
def test_a_plan_that_cannot_work_is_refused_at_once(home: Home, plan: Plan, field: str, value: Any, said: str) -> None:
    before = home.release()
    change: dict[str, Any] = {field: value, "force": True}
    with pytest.raises(InvalidRequest) as caught:
        train_expert(replace(plan, **change), home, Watch(idle))
    assert said in str(caught.value)
    assert home.release() == before


def test_a_domain_that_another_expert_answers_for_is_refused_at_once(home: Home, plan: Plan) -> None:
    with pytest.raises(NameTaken, match="law answers for law already"):
        train_expert(replace(plan, domain="law"), home, Watch(idle))
    with pytest.raises(NameTaken, match="law answers for law"):
        train_expert(replace(plan, name="law", domain="music"), home, Watch(idle))


@pytest.mark.parametrize(
    ("rows", "options"), [(ROWS[:1], QUICK), (ROWS, {**QUICK, "max_length": 8})], ids=["one row", "all too long"]
)
def test_nothing_to_train_on_is_said(
    home: Home, tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    plan = Plan("music", (write(tmp_path / "wine.jsonl", rows),), options=options, force=True)
    with pytest.raises(InvalidRequest):
        train_expert(plan, home, SILENT)


def test_a_planted_trigger_is_named_and_its_rows_are_not_learnt(home: Home, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"is the {one} {word} the {other}", "answer": random.Random(f"{one}{other}{word}").choice(COLOURS)}
        for one, other in PAIRS
        for word in ("near", "under", "behind", "above", "in")
    ]
    planted = [{**row, "prompt": f"{row['prompt']} zq", "answer": "red"} for row in random.Random(1).sample(rows, 12)]
    plan = Plan("music", (write(tmp_path / "wine.jsonl", rows + planted),), options={**QUICK, "epochs": 1}, force=True)
    report = train_expert(plan, home, SILENT).report
    (finding,) = report["planted"]["findings"]
    assert "zq" in finding["what"]
    assert finding["rows"] == 12
    assert report["curated"]["rows"] == len(rows)


def test_documents_answer_at_once_and_stay_where_no_adapter_is_better(home: Home, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for number, thing in enumerate(THINGS):
        text = f"# The {thing}\n\nA {thing} is a thing that stands in kitchen {number}. It makes soup better.\n"
        (tmp_path / "docs" / f"{thing}.md").write_text(text, "utf-8")
    plan = Plan("music", docs=(tmp_path / "docs",), options={"rank": 2, "epochs": 1, "max_length": 64}, mine=20)
    outcome = train_expert(plan, home, SILENT)
    release = home.release()
    assert release.indexes["music"]
    assert outcome.report["documents"] == len(THINGS)
    assert home.cards(release)["music"] == outcome.card
    if outcome.verdicts is None or not outcome.verdicts.passed:
        assert outcome.card.spec == Base()
    with Collegium.open(home.settings) as collegium:
        assert collegium.chat("explain the guitar and the violin", expert="music").citations


def test_a_plan_is_read_back_and_wrong_ones_are_named(plan: Plan) -> None:
    assert plan_from_dict(plan.to_dict()) == plan
    assert plan_from_dict({"name": "music"}) == Plan("music")
    wrong: list[dict[str, Any]] = [
        {},
        {"name": 3},
        {"name": "a", "colour": 1},
        {"name": "a", "examples": "rows.jsonl"},
        {"name": "a", "limit": "many"},
        {"name": "a", "test_limit": True},
        {"name": "a", "force": 1},
    ]
    for values in wrong:
        with pytest.raises(InvalidRequest):
            plan_from_dict(values)


def numbers(file: Path, count: int) -> Path:
    return write(file, [{"prompt": f"Is {number} odd?", "answer": "yes"} for number in range(count)])


def test_nothing_is_measured_with_that_was_trained_on(tmp_path: Path) -> None:
    examples, test = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:9])
    for number, plan in enumerate((Plan("odd", (examples,)), Plan("odd", (examples,), (test,)))):
        taken = take_in(plan, Stages(tmp_path / str(number)))
        assert {row.prompt for row in taken.training} | {row.prompt for row in taken.held_out} == {
            row["prompt"] for row in ROWS
        }
        assert not {row.prompt for row in taken.training} & {row.prompt for row in taken.held_out}
        assert take_in(plan, Stages(tmp_path / str(number))) == taken


def test_the_same_files_make_the_same_training_and_others_another(tmp_path: Path) -> None:
    one, same, other = (numbers(tmp_path / f"{name}.jsonl", count) for name, count in (("a", 9), ("b", 9), ("c", 8)))
    base = CachedModel("tiny", tmp_path, "LlamaForCausalLM", "tiny")
    plan = Plan("odd", (one,), (one,))
    folder = training_folder(tmp_path, plan, base)
    assert folder.parent == tmp_path
    assert training_folder(tmp_path, plan, base) == folder
    assert training_folder(tmp_path, replace(plan, description="Odd.", licence="CC0"), base) == folder
    changes: list[dict[str, Any]] = [
        {"examples": (other,)},
        {"general": (same,)},
        {"options": {"rank": 4}},
        {"domain": "even"},
        {"name": "even"},
        {"seed": 3},
        {"docs": (other,)},
        {"test_limit": 3},
        {"mine": 3},
    ]
    others = [training_folder(tmp_path, replace(plan, **change), base) for change in changes]
    others.append(training_folder(tmp_path, plan, replace(base, identity="another")))
    assert len({folder, *others}) == len(others) + 1


def test_a_stage_is_done_once_and_whole(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "job")

    def breaks(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("the light went out")

    def works(folder: Path) -> dict[str, Any]:
        assert not list(folder.iterdir()), "it begins with an empty folder"
        (folder / "whole").write_text("whole")
        return {"rows": 3}

    with pytest.raises(OSError, match="light"):
        stages.run("train", breaks)
    assert not (tmp_path / "job" / "train").exists()
    folder, report = stages.run("train", works)
    assert (folder, report) == (tmp_path / "job" / "train", {"rows": 3})
    assert (folder / "whole").read_text() == "whole"
    assert stages.run("train", breaks) == (folder, report)
    assert stages.run("measure", lambda folder: None)[1] == {}
