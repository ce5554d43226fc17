"""The command line as a user meets it: what is printed where, and with which exit status it ends."""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from collegium import cli
from collegium.experts.home import Home
from collegium.runtime import Collegium
from collegium.schema import card_from_dict
from collegium.settings import Settings

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "faiss",
    "sklearn",
    "scipy",
    "numpy",
    "sqlalchemy",
    "alembic",
    "fastapi",
)
LAW = "explain the contract of the plaintiff"
COMMAND = str(Path(sys.executable).with_name("collegium"))


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """The last line on standard error."""
        return self.err.rstrip("\n").rpartition("\n")[2]


class Run(Protocol):
    def __call__(self, *arguments: object, stdin: str | bytes = "", terminal: bool = False) -> Result: ...


class Keyboard(io.TextIOWrapper):
    """Standard input; on a `terminal` somebody types it."""

    def __init__(self, data: bytes, terminal: bool) -> None:
        super().__init__(io.BytesIO(data), "utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs `collegium` in this process, which saves loading torch for each command."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")

    def call(*arguments: object, stdin: str | bytes = "", terminal: bool = False) -> Result:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr("sys.argv", ["collegium", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", Keyboard(data, terminal))
        capsys.readouterr()
        status: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
        assert isinstance(status, int)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return call


@pytest.fixture
def reading(run: Run, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run` on a home that tests only read."""
    monkeypatch.setenv("COLLEGIUM_HOME", str(tiny_settings.home))
    return run


@pytest.fixture
def writing(run: Run, fresh_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run` on a home of the test's own."""
    monkeypatch.setenv("COLLEGIUM_HOME", str(fresh_settings.home))
    return run


@pytest.fixture
def home(fresh_settings: Settings) -> Iterator[Home]:
    with Home(fresh_settings) as opened:
        yield opened


def lines(result: Result) -> list[dict[str, Any]]:
    """The JSON objects that a command printed, one a line."""
    assert result.status == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def test_help_is_there_at_once_and_loads_nothing_heavy() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([COMMAND, "--help"], capture_output=True, check=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert all(
        name in done.stdout
        for name in ("chat", "route", "serve", "train", "experts", "router", "decisions", "releases")
    )
    assert done.stderr == ""
    assert seconds < 0.5
    traced = subprocess.run([sys.executable, "-X", "importtime", COMMAND, "--help"], capture_output=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in traced.stderr.decode().splitlines()}
    assert "typer" in imported
    assert not imported & set(HEAVY)


def test_a_process_of_its_own_prints_the_answer_and_nothing_else(tiny_settings: Settings, collegium: Collegium) -> None:
    environ = {**os.environ, "COLLEGIUM_HOME": str(tiny_settings.home)}
    done = subprocess.run([COMMAND, "chat", "--json", LAW], env=environ, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == collegium.chat(LAW).text
    assert done.stderr == ""


@pytest.mark.parametrize(
    "command",
    [
        "chat",
        "route",
        "serve",
        "train",
        "experts",
        "experts list",
        "experts show",
        "experts add",
        "experts remove",
        "router fit",
        "router refit",
        "router show",
        "decisions list",
        "decisions replay",
        "releases list",
        "releases rollback",
        "releases export",
    ],
)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    result = run(*command.split(), "--help")
    assert (result.status, result.err) == (0, "")
    assert "Usage:" in result.out


def test_version(run: Run) -> None:
    from importlib.metadata import version

    assert run("--version") == Result(0, f"collegium {version('collegium')}\n", "")


@pytest.mark.parametrize(
    "wrong",
    [
        ("--nonsense",),
        ("nonsense",),
        ("chat", "--nonsense", "hello"),
        ("chat", "hello", "--max-tokens", "0"),
        ("chat", "hello", "--max-tokens", "many"),
        ("chat", "hello", "--temperature", "3"),
        ("chat", "hello", "world"),
        ("experts", "show"),
        ("train", "music", "--limit", "0"),
        ("releases", "rollback", "yesterday"),
    ],
)
def test_what_is_no_command_is_status_2(reading: Run, wrong: tuple[str, ...]) -> None:
    result = reading(*wrong)
    assert (result.status, result.out) == (2, "")
    assert "Error" in result.err
    assert "Traceback" not in result.err


def test_chat_answers_and_says_who_did(reading: Run, collegium: Collegium) -> None:
    expected = collegium.chat(LAW)
    result = reading("chat", LAW)
    answer, _, about = result.out.partition("\n\n")
    assert (result.status, answer) == (0, expected.text)
    assert about.startswith(f"{expected.expert_version} · the router chose it · first token ")
    assert f"{expected.decision.probabilities['law']:.2f}" in about


def test_chat_json_is_one_object(reading: Run, collegium: Collegium) -> None:
    expected = collegium.chat(LAW)
    (body,) = lines(reading("chat", "--json", LAW))
    assert (body["text"], body["expert_version"], body["mode"]) == (expected.text, expected.expert_version, "lora")
    assert (body["decision"]["expert"], body["decision"]["reason"], body["citations"]) == ("law", "routed", [])
    assert body["usage"] == {"prompt_tokens": expected.usage.prompt_tokens, "completion_tokens": 16} | {
        "total_tokens": expected.usage.prompt_tokens + 16
    }
    assert (body["finish_reason"], set(body["timings"])) == ("length", set(expected.timings))


def test_chat_reads_standard_input_and_options(reading: Run, collegium: Collegium) -> None:
    (body,) = lines(reading("chat", "--json", "--expert", "code", "--max-tokens", "3", stdin=f"{LAW}\n"))
    assert body["text"] == collegium.chat(f"{LAW}\n", expert="code").text[: len(body["text"])]
    assert body["usage"]["completion_tokens"] == 3
    assert body["decision"]["reason"] == "explicit"
    warm = [lines(reading("chat", "--json", "--temperature", "2", LAW))[0]["text"] for _ in range(4)]
    assert len(set(warm)) > 1


@pytest.mark.parametrize("stdin", ["", " \n"])
def test_nothing_to_answer_is_said(reading: Run, stdin: str) -> None:
    result = reading("chat", stdin=stdin)
    assert (result.status, result.out, result.said) == (1, "", "collegium: The prompt is empty. Write a question.")


@pytest.mark.parametrize("command", ["chat", "route"])
def test_input_that_is_no_text_is_said(reading: Run, command: str) -> None:
    result = reading(command, stdin=b"explain \xff\xfe the contract\n")
    assert result.status == 1
    assert result.said.startswith("collegium: ")
    assert "UTF-8" in result.said


def test_an_unknown_expert_is_a_sentence_that_lists_the_known_ones(reading: Run) -> None:
    for command in (("chat", LAW, "--expert", "tax"), ("experts", "show", "tax"), ("experts", "remove", "tax")):
        result = reading(*command)
        assert (result.status, result.out) == (1, "")
        assert result.said.startswith("collegium: ")
        assert "'tax'" in result.said
        assert result.said.endswith("Known: base, code, law.")
        assert "Traceback" not in result.err


def test_a_conversation_on_a_terminal(reading: Run, collegium: Collegium) -> None:
    first = collegium.chat(LAW).text
    turns = [{"role": "user", "content": LAW}, {"role": "assistant", "content": first}]
    second = collegium.chat([*turns, {"role": "user", "content": "And why?"}]).text
    result = reading("chat", stdin=f"{LAW}\nAnd why?\n\nnever read\n", terminal=True)
    assert result.status == 0
    assert first in result.out
    assert result.out.index(first) < result.out.index(f"{second}\n\n")
    assert result.out.count("first token") == 2
    result = reading("chat", "--continue", LAW, stdin="And why?\n", terminal=True)
    assert (result.status, result.out.count("first token")) == (0, 2)
    assert f"{second}\n\n" in result.out
    result = reading("chat", LAW, stdin="And why?\n", terminal=True)
    assert (result.status, result.out.count("first token")) == (0, 1)


def test_a_conversation_goes_on_after_a_turn_that_failed(reading: Run, collegium: Collegium) -> None:
    result = reading("chat", stdin=f"{'x' * 500}\n{LAW}\n", terminal=True)
    assert result.status == 0
    assert "400 fit" in result.err.replace("\n", " ")
    assert collegium.chat(LAW).text in result.out


def test_route_says_who_would_answer(reading: Run, prompts: Mapping[str, str]) -> None:
    bodies = lines(reading("route", "--json", *prompts.values()))
    assert [body["prompt"] for body in bodies] == list(prompts.values())
    assert [body["domain"] for body in bodies] == ["law", "code", "health", "math", None]
    assert [body["expert"] for body in bodies] == ["law", "code", "base", "base", "base"]
    piped = reading("route", "--json", stdin="\n".join([prompts["law"], "", "  ", prompts["code"]]))
    assert lines(piped) == bodies[:2]
    nothing = reading("route", "--json", stdin="")
    assert (nothing.status, nothing.out) == (0, "")
    plain = reading("route", prompts["law"], prompts["unknown"])
    assert plain.status == 0
    assert f"{prompts['law']}\nlaw · the router chose it\n" in plain.out
    assert "base · no domain fits, so the fallback answers\n" in plain.out


@pytest.mark.parametrize("prompt", ["[bold]a[/bold] [/b] [1]", "d[:key:] :smile:", "a\\[b]\\", "a\tb", "ünï 日本"])
def test_what_a_user_writes_is_shown_as_it_is(reading: Run, prompt: str) -> None:
    assert reading("route", prompt).out.startswith(f"{prompt}\n")
    (body,) = lines(reading("route", "--json", prompt))
    assert body["prompt"] == prompt


def test_experts_are_listed_and_shown(reading: Run, collegium: Collegium) -> None:
    cards = collegium.experts()
    listed = reading("experts", "list")
    assert listed.status == 0
    for card in cards.values():
        assert any(card.version in line for line in listed.out.splitlines())
    (body,) = [json.loads(reading("experts", "list", "--json").out)]
    assert {name: card_from_dict(one) for name, one in body.items()} == cards
    for name in ("law", cards["law"].version, cards["law"].version[:12]):
        shown = reading("experts", "show", name)
        assert shown.status == 0
        assert cards["law"].version in shown.out
        assert "Questions about law." in shown.out
        assert card_from_dict(json.loads(reading("experts", "show", name, "--json").out)) == cards["law"]


def test_a_domain_is_added_and_removed_and_brought_back(writing: Run, home: Home, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "song.txt").write_text("The guitar and the violin by the river.", "utf-8")
    (docs / "photo.png").write_bytes(b"\x89PNG")
    asked = [
        f"{start} guitar and {other} violin\n" for start in ("is the", "a", "explain the") for other in ("a", "the")
    ]
    (tmp_path / "prompts.txt").write_text("".join(asked), "utf-8")
    added = writing("experts", "add", "music", "--docs", docs, "--examples", tmp_path / "prompts.txt")
    card = home.cards(home.release())["music"]
    live = home.release().id
    assert (added.status, added.out) == (
        0,
        f"{card.version} is live.\nThe router's head was refitted: release {live}.\n",
    )
    assert "photo.png was not read" in added.err
    (body,) = lines(writing("chat", "--json", "a guitar and a violin"))
    assert (body["expert_version"], body["citations"][0]["document"]) == (card.version, "song.txt")
    assert "[1] song.txt, characters 0-39" in writing("chat", "a guitar and a violin").out
    (body,) = lines(writing("chat", "--json", "--no-retrieval", "a guitar and a violin"))
    assert body["citations"] == []
    removed = writing("experts", "remove", "music")
    assert removed.status == 0
    assert f"release {home.release().id}" in removed.out
    assert "music" not in home.release().aliases
    assert writing("releases", "rollback", live) == Result(0, f"Release {live} is live.\n", "")
    assert home.release().aliases["music"] == card.version
    listed = writing("releases", "list").out.splitlines()
    assert [line.split()[0] == "*" for line in listed] == [False, True, False, False]
    assert [line.split()[-2:] for line in listed[:3]] == [
        ["remove", "music"],
        ["router's", "head"],
        ["add", card.version],
    ]


def test_an_adapter_is_added(writing: Run, home: Home, adapters: Mapping[str, Path]) -> None:
    assert writing("experts", "add", "math", "--adapter", adapters["code"]).status == 0
    assert home.cards(home.release())["math"].spec.kind == "lora"


@pytest.mark.parametrize("description", ["the guitar [/law] and the violin", "a [red]guitar[/red]", ":violin: guitars"])
def test_a_description_is_shown_as_it_is(writing: Run, description: str) -> None:
    assert writing("experts", "add", "music", "--description", description).status == 0
    shown, listed = writing("experts", "show", "music"), writing("experts", "list")
    assert (shown.status, listed.status) == (0, 0)
    assert description in shown.out
    assert description.rsplit(maxsplit=1)[-1] in listed.out
    assert description.split(maxsplit=1)[0] in listed.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "music"), "Nothing says what 'music' is about"),
        (("add", "Music", "--description", "x"), "'Music' cannot be a name"),
        (("add", "music", "--docs", "nowhere"), "nowhere does not exist"),
        (("add", "music", "--examples", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("add", "music", "--description", "x", "--adapter", "nowhere"), "nowhere has no adapter_config.json"),
        (("remove", "base"), "base answers where no other expert does"),
    ],
)
def test_what_cannot_be_registered_is_a_sentence(reading: Run, arguments: tuple[str, ...], said: str) -> None:
    result = reading("experts", *arguments)
    assert (result.status, result.out) == (1, "")
    assert result.said.startswith("collegium: ")
    assert said in result.said


def test_a_release_is_exported(reading: Run, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    assert reading("releases", "export", folder) == Result(0, f"Wrote {folder}.\n", "")
    assert set(json.loads((folder / "release.json").read_text("utf-8"))["aliases"]) == {"base", "law", "code"}


def test_a_release_that_is_not_there_lists_those_that_are(reading: Run) -> None:
    result = reading("releases", "rollback", 99)
    assert (result.status, result.err) == (1, "collegium: There is no release 99. Releases: 1.\n")


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"COLLEGIUM_THREADS": "-1"}, "Setting 'threads'"),
        ({"COLLEGIUM_TREADS": "1"}, "Unknown setting 'treads'"),
        ({"COLLEGIUM_CONFIG": "/nowhere/collegium.toml"}, "/nowhere/collegium.toml, which does not exist"),
        ({"COLLEGIUM_BASE_MODEL": "nothing"}, "'nothing' is not the name of a model"),
        ({"COLLEGIUM_FALLBACK": "nobody"}, "'nobody' is not an expert"),
        ({"COLLEGIUM_DATABASE_URL": "mysql://x"}, "database_url is for mysql"),
    ],
)
def test_bad_settings_are_a_sentence(
    reading: Run, monkeypatch: pytest.MonkeyPatch, environ: Mapping[str, str], said: str
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    result = reading("route", LAW)
    assert (result.status, result.out) == (1, "")
    assert result.said.startswith("collegium: ")
    assert said in result.said


def test_a_home_is_named_on_the_command_line(writing: Run, tmp_path: Path, home: Home) -> None:
    writing("experts", "add", "music", "--description", "Guitars.")
    result = writing("--home", tmp_path / "other", "experts", "list", "--json")
    assert set(json.loads(result.out)) == {"base", "law", "code"}
    assert (tmp_path / "other" / "collegium.sqlite").exists()
    assert "music" in home.release().aliases


def test_a_command_that_is_stopped_says_so(reading: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Collegium, "open", stop)
    result = reading("route", LAW)
    assert result.status == 130
    assert "Traceback" not in result.err


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    things = itertools.permutations(["guitar", "violin", "river", "mountain", "kitchen", "soup", "recipe"], 2)
    rows = [
        {"prompt": f"the {one} and the {two}", "answer": "white", "choices": ["red", "white"]} for one, two in things
    ]
    file = tmp_path / "wine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("rank", "'rank' is not NAME=VALUE"),
        ("=4", "'=4' is not NAME=VALUE"),
        ("ranks=4", "ranks"),
        ("rank=many", "rank"),
        ("rank=0", "rank"),
        ("batch-size=0", "batch_size"),
    ],
)
def test_an_option_that_cannot_be_is_a_sentence(writing: Run, rows: Path, option: str, said: str) -> None:
    result = writing("train", "music", "--examples", rows, "--option", option)
    assert result.status == 1
    assert result.said.startswith("collegium: ")
    assert said in result.said


@pytest.mark.parametrize("flag", ["--examples", "--test", "--general"])
def test_rows_that_are_not_there_are_a_sentence(writing: Run, rows: Path, flag: str) -> None:
    result = writing("train", "music", "--examples", rows, flag, "nowhere.jsonl")
    assert (result.status, result.out) == (1, "")
    assert result.said.startswith("collegium: nowhere.jsonl does not exist.")


def test_training_is_refused_or_forced(writing: Run, rows: Path, home: Home) -> None:
    options = [f"--option={one}" for one in ("rank=2", "epochs=1", "learning-rate=0", "max_length=128")]
    command = ["train", "music", "--examples", rows, *options, "--description", "Guitars."]
    refused = writing(*command)
    assert refused.status == 1
    assert "collegium: music is not better than the base: " in refused.err
    assert "--force" in refused.said
    assert "music" not in home.release().aliases
    forced = writing(*command, "--force")
    card = home.cards(home.release())["music"]
    assert forced.status == 0
    assert card.evidence.forced
    assert f"{card.version} is live. Gate: not better than the base: " in forced.out
    assert "(forced)" in forced.out
    assert card.evidence.recipe["learning_rate"] == 0
    assert "gate: not better than the base" in writing("experts", "show", "music").out


def test_a_router_is_fitted_anew(writing: Run, home: Home, tmp_path: Path) -> None:
    writing("experts", "add", "music", "--description", "Guitars.")
    files = []
    for source in ("train", "dev"):
        texts = {"law": "the court and the contract", "code": "a python function", "health": "the doctor and a fever"}
        rows = [
            {"text": f"{text} {number}", "domain": domain, "source": f"{source}-{domain}"}
            for domain, text in texts.items()
            for number in range(6)
        ]
        files.append(tmp_path / f"{source}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    result = writing("router", "fit", "--train", files[0], "--dev", files[1], "--no-tune")
    accuracy, _, said = result.out.rpartition("}\n")
    assert result.status == 0
    assert set(json.loads(f"{accuracy}}}")) == {"law/dev-law", "code/dev-code", "health/dev-health", "mean"}
    assert said == f"Release {home.release().id} is live.\n"
    (body,) = lines(writing("route", "--json", LAW))
    assert "law" in body["probabilities"]
    assert "music" not in body["probabilities"]
    refused = writing("router", "fit", "--train", files[0], "--dev", files[0])
    assert refused.status == 1
    assert "shares the sources" in refused.said
    assert writing("experts", "remove", "music").status == 0
