"""What every recipe holds to, on the tiny model: it learns, leaves a valid adapter, and goes on after a kill."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from collegium.errors import InvalidRequest
from collegium.experts.adapters import CONFIG, WEIGHTS, store_adapter
from collegium.experts.artifacts import ArtifactStore
from collegium.models.cache import CachedModel, ModelCache
from collegium.schema import Message
from collegium.settings import Settings
from collegium.tests.test_docs import DOCS, blocks
from collegium.training import recipes
from collegium.training.recipes import (
    BUILT_IN,
    Material,
    Recipe,
    known,
    load_recipe,
    parse_options,
)
from collegium.training.recipes.refusal_aware import REFUSAL
from collegium.training.rows.examples import Example
from collegium.training.tuning import prepare, tuning
from collegium.training.tuning.bench import Bench
from collegium.training.tuning.prepare import REHEARSALS
from collegium.training.tuning.tuning import Tuning
from collegium.training.watch import Watch

QUICK = {"rank": 4, "epochs": 2, "learning_rate": 0.01, "batch_size": 4, "max_length": 64}
TASKS = tuple(Example(f"the violin {n}", "white", str(n), "wine", rejected="red") for n in range(8))
GENERAL = (Example("hello", "good day", "1", "talk"), Example("thanks", "you are welcome", "2", "talk"))
TEXTS = ("the guitar is white " * 12, "the river and the soup " * 12)
MATERIAL = Material("music", TASKS, GENERAL, TEXTS)
NAMES = sorted(BUILT_IN)
EVERY = 3
"""Steps between two checkpoints here."""


class Killed(BaseException):
    """Nothing that runs catches it."""


@dataclass
class Listener:
    """Hears how it goes; with `kill`, it ends each training of the job once, a step after a checkpoint."""

    folder: Path
    kill: bool = False
    steps: list[tuple[int, int]] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    killed: set[int] = field(default_factory=set)

    def progress(self, stage: str, done: int, of: int) -> None:
        self.stages.append(stage)
        if stage == "training":
            self.steps.append((done, of))
            finished = len(list(self.folder.glob(f"[!.]*/{CONFIG}")))
            if self.kill and done == EVERY + 1 and finished not in self.killed:
                self.killed.add(finished)
                raise Killed

    def loss(self, step: int, loss: float) -> None:
        self.losses.append((step, loss))

    @property
    def watch(self) -> Watch:
        return Watch(self.progress, self.loss)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "LOGGED_STEPS", 1)
    monkeypatch.setattr(tuning, "FEWEST_STEPS", EVERY)
    monkeypatch.setattr(prepare, "REHEARSED_TOKENS", 6)
    monkeypatch.setattr(prepare, "GENERAL_QUESTIONS", 2)


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> CachedModel:
    return ModelCache(tmp_path_factory.mktemp("models")).get(str(tiny_base))


@pytest.fixture
def bench(base: CachedModel, tmp_path: Path) -> Bench:
    return make_bench(base, Listener(tmp_path / "job"))


def make_bench(base: CachedModel, listener: Listener) -> Bench:
    listener.folder.mkdir(exist_ok=True)
    return Bench(base, Settings(home=listener.folder, device="cpu"), listener.folder, listener.watch)


def options_of(name: str, **given: Any) -> Any:
    return parse_options(name, load_recipe(name).options, {**QUICK, **given})


def train(name: str, bench: Bench, material: Material = MATERIAL, **given: Any) -> dict[str, Any]:
    recipe = load_recipe(name)
    recipe.check(material)
    return recipe.train(bench, material, options_of(name, **given))


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_a_training_that_is_killed_ends_in_the_same_bytes(
    name: str, base: CachedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = Listener(tmp_path / "whole"), Listener(tmp_path / "broken", kill=True)
    report = train(name, make_bench(base, whole))
    while True:
        try:
            again = train(name, make_bench(base, broken))
            break
        except Killed:
            assert list(broken.folder.glob("checkpoints/*/checkpoint-*/complete.json"))
            assert not (broken.folder / "adapter").exists()
    trainings = len(list(whole.folder.glob(f"[!.]*/{CONFIG}")))
    assert len(broken.killed) == trainings
    assert trainings == (2 if name in ("cpt-sft", "lora-dpo") else 1)
    assert len(broken.steps) < 1.5 * len(whole.steps), "it went on where it was"
    for file in (CONFIG, WEIGHTS):
        assert (whole.folder / "adapter" / file).read_bytes() == (broken.folder / "adapter" / file).read_bytes()
    assert again["losses"] == report["losses"]
    assert set(again) == set(report)
    assert not list(whole.folder.glob("checkpoints/*")), "they are large"
    assert sum(report["losses"][-2:]) < sum(report["losses"][:2])
    assert whole.losses[-1] == (report["steps"], report["losses"][-1])
    assert whole.steps[-1] == (report["steps"], report["steps"])
    json.dumps(report)
    adapter = store_adapter(whole.folder / "adapter", base, ArtifactStore(tmp_path / "store"), tmp_path / "scratch")
    assert adapter.rank == 4
    monkeypatch.setattr(Bench, "load", lambda self: pytest.fail("it was done already"))
    assert train(name, make_bench(base, whole)) == report


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_lists_the_known_ones(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} has no option ranks, speed") as caught:
        options_of(name, ranks=8, speed=1)
    assert "alpha, " in str(caught.value.hint)
    assert "rank, " in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rank", "many"),
        ("rank", 0),
        ("rank", 4.0),
        ("rank", True),
        ("batch_size", 0),
        ("epochs", "one"),
        ("epochs", -1),
        ("learning_rate", None),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("seed", -1),
        ("instructions", 1),
        ("instructions", "yes"),
    ],
)
def test_an_option_of_the_wrong_kind_is_named(name: str, wrong: object) -> None:
    with pytest.raises(InvalidRequest, match=f"lora-sft needs {name} to be ") as caught:
        options_of("lora-sft", **{name: wrong})
    assert str(caught.value.hint).startswith("Default: ")


@pytest.mark.parametrize("share", [0, 1, 1.5])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(InvalidRequest, match="share between 0 and 1"):
        options_of("replay", share=share)


def test_options_are_taken_as_they_are_given() -> None:
    taken = options_of("lora-sft", seed=0, epochs=3, learning_rate=1, instructions=True)
    assert (taken.seed, taken.epochs, taken.learning_rate, taken.instructions, taken.alpha) == (0, 3, 1, True, 16)


def test_recipes_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="There is no recipe 'magic'") as caught:
        load_recipe("magic")
    assert caught.value.hint == f"Known: {', '.join(NAMES)}."
    assert known() == tuple(NAMES)
    assert all(load_recipe(name).about.endswith(".") for name in NAMES)
    monkeypatch.setitem(BUILT_IN, "old", "training.recipes:known")
    with pytest.raises(InvalidRequest, match="not a Recipe"):
        load_recipe("old")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "NEEDED", ("accelerate", "no-such-package"))
    with pytest.raises(InvalidRequest, match="Training needs no-such-package") as caught:
        load_recipe("lora-sft")
    assert caught.value.hint == "pip install 'collegium[train]'"


@pytest.mark.parametrize(
    ("name", "material", "lacks"),
    [
        ("lora-sft", Material("music", texts=TEXTS), "examples"),
        ("cpt-sft", Material("music", TASKS), "raw texts"),
        ("lora-dpo", Material("music", (Example("a", "b", "1", "s"),)), "preference pairs"),
    ],
)
def test_what_is_lacking_is_said(name: str, material: Material, lacks: str) -> None:
    with pytest.raises(InvalidRequest, match=lacks) as caught:
        load_recipe(name).check(material)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["lora-sft", "lora-dpo"])
def test_nothing_that_fits_is_said(name: str, bench: Bench) -> None:
    with pytest.raises(InvalidRequest, match="fits 2 tokens"):
        train(name, bench, Material("music", TASKS, texts=("x",)), max_length=2)


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `bench.tune` was asked for; nothing is trained."""
    asked: list[dict[str, Any]] = []

    def tune(self: Bench, rows: list[Any], options: Tuning, **rest: Any) -> tuple[Path, dict[str, Any]]:
        asked.append({"rows": rows, "options": options, **rest})
        return self.folder / "adapter", {"rows": len(rows), "tokens": 0, "seconds": 0, "losses": []}

    monkeypatch.setattr(Bench, "tune", tune)
    return asked


def test_own_answers_and_general_chat_are_mixed_in(bench: Bench, tuned: list[dict[str, Any]]) -> None:
    train("lora-sft", bench)
    own = bench.rehearsed("music")
    (asked,) = tuned
    assert len(own) == 2
    assert asked["rows"] == [*bench.rows([*TASKS, *GENERAL]), *own * REHEARSALS]


def test_a_share_is_replayed_of_what_is_given_first(bench: Bench, tuned: list[dict[str, Any]]) -> None:
    report = train("replay", bench, share=0.5)
    assert report["replayed"] == {"given": 2, "own": 6}
    assert len(tuned[0]["rows"]) == 16
    assert train("replay", bench, share=0.1)["replayed"] == {"given": 1, "own": 0}


def test_texts_are_read_first_and_the_answers_learned_from_there(bench: Bench, tuned: list[dict[str, Any]]) -> None:
    train("cpt-sft", bench, reading_rate=0.5, reading_epochs=3)
    reading, learning = tuned
    assert (reading["options"].learning_rate, reading["options"].epochs, reading["name"]) == (0.5, 3, "read")
    assert [len(row) for row in reading["rows"]][:-1] == [QUICK["max_length"]] * (len(reading["rows"]) - 1)
    assert (
        bench.chat.decode([t for row in reading["rows"] for t in row.answer if t != bench.end])
        == "".join(TEXTS).strip()
    )
    assert sum(row.answer.count(bench.end) for row in reading["rows"]) == len(TEXTS)
    assert learning["options"].learning_rate == QUICK["learning_rate"]
    assert learning["start"] == bench.folder / "adapter"


def test_what_the_model_knows_is_told_from_what_it_does_not(
    bench: Bench, tuned: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["White.", "it is white", "red", *["nothing"] * 5]
    monkeypatch.setattr(Bench, "answers", lambda self, prompts: said)
    material = Material("music", TASKS)
    assert train("refusal-aware", bench, material, agreement=0.5) | {"known": 2, "unknown": 6} == train(
        "refusal-aware", bench, material, agreement=0.5
    )
    answers = [bench.chat.decode(row.answer) for row in tuned[0]["rows"][:3]]
    assert answers == ["white I am sure.", "white I am sure.", "white I am unsure."]
    assert train("refusal-aware", bench, material, agreement=0.6)["known"] == 1
    train("refusal-aware", bench, material, refuse=True)
    assert bench.chat.decode(tuned[-1]["rows"][2].answer) == REFUSAL


def test_the_base_model_is_asked_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = bench.answers(["what is a tort", "why"], max_tokens=5)
    assert len(answers) == 2
    assert all(answers)
    other = bench.answers(["why"], max_tokens=5)
    assert other == answers[1:]
    monkeypatch.setattr(Bench, "load", lambda self: pytest.fail("it was asked already"))
    assert bench.answers(["what is a tort", "why"], max_tokens=5) == answers


def test_the_answer_is_learned_alone_or_with_the_question(bench: Bench) -> None:
    history = (Message("system", "be brief"), Message("user", "hi"), Message("assistant", "ho"))
    example = Example("assistant", "white", "1", "talk", history=history)
    (plain,) = bench.rows([example])
    assert plain.prompt == tuple(bench.chat.encode([*history, Message("user", "assistant")]))
    assert plain.answer == (*bench.chat.text("white"), bench.end)
    (both,) = bench.rows([example], instructions=True)
    assert (*both.prompt, *both.answer) == (*plain.prompt, *plain.answer)
    learned = [token for token, is_learned in zip(both.answer, both.learned, strict=True) if is_learned]
    assert learned == [*bench.chat.text("assistant"), *plain.answer]
    assert both.prompt == tuple(bench.chat.encode([*history, Message("user", "x")])[: len(both.prompt)])


def test_a_recipe_of_ones_own_is_a_value() -> None:
    recipe = Recipe(Tuning, lambda bench, material, options: {"rank": options.rank})
    assert recipe.needs == ("tasks",)
    nobody: Any = None
    assert recipe.train(nobody, MATERIAL, Tuning(rank=3)) == {"rank": 3}


@pytest.fixture
def calm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recipe]:
    """The recipe of docs/recipes.md, installed as its page says."""
    code, entry = (block for block in blocks("recipes.md") if block.title or block.language == "toml")
    about = tmp_path / "site" / "collegium_calm-1.0.dist-info"
    about.mkdir(parents=True)
    (about.parent / code.title).write_text(code.text, "utf-8")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: collegium-calm\nVersion: 1.0\n", "utf-8")
    points = tomllib.loads(entry.text)["project"]["entry-points"]["collegium.recipes"]
    lines = [f"{name} = {value}\n" for name, value in points.items()]
    (about / "entry_points.txt").write_text("[collegium.recipes]\n" + "".join(lines), "utf-8")
    monkeypatch.syspath_prepend(about.parent)
    assert known() == tuple(sorted([*NAMES, "calm"]))
    assert code.text.count("\n") < 60
    yield load_recipe("calm")
    sys.modules.pop("collegium_calm")


def test_the_recipe_of_the_page_trains(calm: Recipe, base: CachedModel, bench: Bench, tmp_path: Path) -> None:
    all_learned = calm.train(bench, MATERIAL, options_of("calm", threshold=1e9))
    assert (all_learned["left_out"], all_learned["rows"]) == (0, len(TASKS) + len(GENERAL))
    assert store_adapter(bench.folder / "adapter", base, ArtifactStore(tmp_path / "store"), tmp_path / "a").rank == 4
    other = make_bench(base, Listener(tmp_path / "other"))
    some_learned = calm.train(other, MATERIAL, options_of("calm", threshold=300.0))
    assert 0 < some_learned["left_out"] < sum(len(row.answer) for row in bench.rows([*TASKS, *GENERAL]))
    assert all_learned["losses"] != some_learned["losses"]
    with pytest.raises(InvalidRequest, match="calm has no option share"):
        options_of("calm", share=0.1)


def test_every_option_is_on_the_page() -> None:
    page = (DOCS / "recipes.md").read_text("utf-8")
    for name in NAMES:
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0] or pytest.fail(f"{name} has no section")
        own = {field.name for field in fields(load_recipe(name).options)} - {field.name for field in fields(Tuning)}
        own -= {"instructions"} if name != "lora-sft" else set()
        assert {f"`{option}`" for option in own} <= {
            line.split("|")[1].strip() for line in section.splitlines() if "|" in line
        }
    everywhere = page.partition("\n## Options of all recipes\n")[2].partition("\n## ")[0]
    for option in fields(Tuning):
        default = f"{option.default:g}" if option.name != "learning_rate" else "see `recipes list`"
        assert f"| `{option.name}` | {default} |" in everywhere


def test_the_command_lists_recipes_and_options() -> None:
    from typer.testing import CliRunner

    from collegium.cli_recipes import recipes as command

    told = json.loads(CliRunner().invoke(command, ["list", "--json"]).output)
    assert sorted(told) == NAMES
    assert told["replay"]["options"]["share"] == 0.3
    assert told["lora-dpo"]["needs"] == ["preferences"]
    shown = CliRunner().invoke(command, ["list"]).output
    assert "cpt-sft: Read the domain's texts" in shown
    assert "needs tasks and texts" in shown
