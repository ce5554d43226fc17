"""Rows are read as they were meant, and what is wrong with one is said by file and line."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.errors import InvalidRequest
from collegium.schema import Message
from collegium.training.rows.examples import Example, from_json, read_examples, to_json

GOOD = {"prompt": "Is it red?", "answer": "yes"}


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["wine.train.jsonl", "wine.train.jsonl.gz"])
def test_rows_are_read(tmp_path: Path, name: str) -> None:
    full = {**GOOD, "id": 7, "source": "cellar", "topic": "colour", "choices": ["yes", "no"], "context": "A glass."}
    more = {**GOOD, "unheard_of": 1, "topic": None, "choices": None, "prompt": "  Ünïcode {0} <|im_end|> "}
    file = write(tmp_path / name, [GOOD, full, more])
    assert read_examples([file]) == [
        Example("Is it red?", "yes", "wine-1", "wine"),
        Example("Is it red?", "yes", "7", "cellar", "colour", ("yes", "no"), "A glass."),
        Example("  Ünïcode {0} <|im_end|> ", "yes", "wine-3", "wine"),
    ]


def test_blank_lines_are_no_rows_but_lines(tmp_path: Path) -> None:
    file = tmp_path / "wine.jsonl"
    file.write_text(f"\n{json.dumps(GOOD)}\r\n   \n{json.dumps(GOOD)}", "utf-8")
    assert [row.id for row in read_examples([file])] == ["wine-2", "wine-4"]


def test_files_are_read_in_order(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", [GOOD] * 2) for name in ("b", "a")]
    assert [row.id for row in read_examples(files)] == ["b-1", "b-2", "a-1", "a-2"]
    assert read_examples([]) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'prompt': 1}", "not JSON"),
        ('{"prompt": "cut', "not JSON"),
        ("[]", "needs 'prompt' and 'answer'"),
        ('"prompt answer"', "needs 'prompt' and 'answer'"),
        ('{"answer": "yes"}', "needs 'prompt'"),
        ('{"prompt": "Is it?"}', "'answer'"),
        ('{"prompt": " ", "answer": "yes"}', "not empty"),
        ('{"prompt": "Is it?", "answer": 3}', "both text"),
        ('{"prompt": "Is it?", "answer": "maybe", "choices": ["yes", "no"]}', "'maybe' is not among the choices"),
        ('{"prompt": "Is it?", "answer": "yes", "choices": ["yes", 1]}', "'choices' is a list of texts"),
        ('{"prompt": "Is it?", "answer": "yes", "choices": ["yes", ""]}', "'choices'"),
        ('{"prompt": "Is it?", "answer": "yes", "choices": "yes no"}', "'choices' is a list of texts"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, said: str, suffix: str) -> None:
    text = f"{json.dumps(GOOD)}\n\n{line}\n"
    file = tmp_path / f"wine{suffix}"
    file.write_bytes(gzip.compress(text.encode()) if suffix == ".jsonl.gz" else text.encode())
    with pytest.raises(InvalidRequest) as caught:
        read_examples([file])
    assert caught.value.message.startswith(f"{file}:3: ")
    assert said in caught.value.message


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "wine.jsonl"
    file.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"wine\.jsonl holds no examples") as caught:
        read_examples([write(tmp_path / "good.jsonl", [GOOD]), file])
    assert caught.value.hint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"wine\.jsonl does not exist") as caught:
        read_examples([tmp_path / "wine.jsonl"])
    assert caught.value.hint


def broken(content: bytes) -> bytes:
    """A gzip file with a wrong byte in its middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


PACKED = gzip.compress("".join(json.dumps({**GOOD, "prompt": f"Is it {n}?"}) + "\n" for n in range(99)).encode())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.jsonl", '{"prompt": "Grüße", "answer": "x"}'.encode("latin-1")),
        ("latin.jsonl.gz", gzip.compress('{"prompt": "Grüße", "answer": "x"}'.encode("latin-1"))),
        ("plain.jsonl.gz", json.dumps(GOOD).encode()),
        ("packed.jsonl", PACKED),
        ("cut.jsonl.gz", PACKED[:-20]),
        ("broken.jsonl.gz", broken(PACKED)),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest, match=name):
        read_examples([tmp_path / name])


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "wine.jsonl").mkdir()
    with pytest.raises(InvalidRequest, match=r"wine\.jsonl"):
        read_examples([tmp_path / "wine.jsonl"])


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"Is {number} odd?", "answer": "yes"} for number in range(100)]
    return write(tmp_path_factory.mktemp("rows") / "odd.jsonl", rows)


@given(limit=st.integers(1, 130))
def test_a_limit_draws_the_same_rows_every_time(hundred: Path, limit: int) -> None:
    drawn = read_examples([hundred], limit=limit)
    assert drawn == read_examples([hundred], limit=limit)
    assert len({row.id for row in drawn}) == len(drawn) == min(limit, 100)
    assert set(drawn) <= set(read_examples([hundred]))


def test_a_limit_draws_from_the_whole_of_each_file(hundred: Path, tmp_path: Path) -> None:
    drawn = [int(row.id.removeprefix("odd-")) for row in read_examples([hundred], limit=10)]
    assert max(drawn) > 60
    assert sum(number <= 10 for number in drawn) < 5
    small = write(tmp_path / "small.jsonl", [GOOD] * 3)
    both = read_examples([hundred, small], limit=10)
    assert [row.source for row in both] == ["odd"] * 10 + ["small"] * 3


def read(tmp_path: Path, *rows: Mapping[str, Any]) -> list[Example]:
    return read_examples([write(tmp_path / "tea.jsonl", rows)])


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


ASKED = ("user", "Is tea hot?")
HISTORY = (Message("system", "Be brief."), Message("user", "Hi!"), Message("assistant", "Hello."))
TURNS = chat(("system", "Be brief."), ("user", "Hi!"), ("assistant", "Hello."), ASKED, ("assistant", "Mostly."))
TEA = Example("Is tea hot?", "Mostly.", "tea-1", "tea")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Is tea hot?", "answer": "Mostly.", "label": "ignored", "messages": 3}, TEA),
        ({"prompt": "Is tea hot?", "completion": "Mostly."}, TEA),
        ({"prompt": "Is tea hot?", "response": "Mostly."}, TEA),
        ({"question": "Is tea hot?", "answer": "Mostly.", "group": 7}, replace(TEA, group="7")),
        ({"input": "Is tea hot?", "output": "Mostly."}, TEA),
        ({"text": "Is tea hot?", "label": "Mostly."}, TEA),
        ({"text": "Is tea hot?", "intent": "Mostly.", "label": None}, TEA),
        ({"instruction": "Is tea hot?", "input": "", "output": "Mostly."}, TEA),
        ({"instruction": "Is it hot?", "input": "tea", "output": "Mostly."}, replace(TEA, prompt="Is it hot?\n\ntea")),
        ({"messages": TURNS}, replace(TEA, history=HISTORY)),
        ({"messages": [*TURNS, *chat(("user", "Thanks!"))]}, replace(TEA, history=HISTORY)),
        (
            {"conversations": [{"from": "human", "value": "Is tea hot?"}, {"from": "gpt", "value": "Mostly."}]},
            TEA,
        ),
        ({"prompt": TURNS[:-1], "completion": TURNS[-1:]}, replace(TEA, history=HISTORY)),
        ({"prompt": "Is tea hot?", "answer": "Mostly.", "history": TURNS[:3]}, replace(TEA, history=HISTORY)),
        (
            {"prompt": "Is tea hot?", "answer": "Mostly.", "history": [["Hi!", "Hello."]]},
            replace(TEA, history=HISTORY[1:]),
        ),
        ({"prompt": "Is tea hot?", "answer": "Mostly.", "rejected": "No!"}, replace(TEA, rejected="No!")),
        ({"prompt": "Is tea hot?", "chosen": "Mostly.", "rejected": "No!"}, replace(TEA, rejected="No!")),
        (
            {"chosen": chat(ASKED, ("assistant", "Mostly.")), "rejected": chat(ASKED, ("assistant", "No!"))},
            replace(TEA, rejected="No!"),
        ),
        (
            {"prompt": TURNS[:4], "chosen": TURNS[4:], "rejected": chat(("assistant", "No!"))},
            replace(TEA, rejected="No!", history=HISTORY),
        ),
        (
            {"prompt": "Is tea hot?", "chosen": TURNS[4:], "rejected": chat(("assistant", "No!")), "messages": TURNS},
            replace(TEA, rejected="No!"),
        ),
    ],
)
def test_rows_of_other_forms_are_read(tmp_path: Path, row: dict[str, Any], expected: Example) -> None:
    assert read(tmp_path, row) == [expected]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"title": "Tea", "body": "Hot."}, "this one has 'title', 'body'"),
        ({"text": "Is tea hot?", "label": 3}, "'label' is a number"),
        ({"prompt": "Is tea hot?", "answer": True}, "'answer' is true or false"),
        ({"question": "Is tea hot?", "answer": "Yes.", "response": "No."}, "ambiguous"),
        ({"messages": []}, "needs a message of the user"),
        ({"messages": chat(ASKED)}, "needs a message of the user that a message of the assistant answers"),
        ({"messages": chat(("assistant", "Hello."))}, "needs a message of the user"),
        ({"messages": chat(ASKED, ("assistant", " "))}, "not empty"),
        ({"messages": chat(ASKED, ("tool", "42"))}, "the role 'tool'; allowed are system, user, assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content is a list"),
        ({"messages": "Is tea hot?"}, "'messages' is a list of messages"),
        ({"chosen": "Mostly.", "rejected": "No!"}, "need their 'prompt'"),
        ({"chosen": TURNS[4:], "rejected": chat(("assistant", "No!"))}, "no field 'prompt'"),
        ({"prompt": "Is tea hot?", "chosen": TURNS[4:], "rejected": "No!"}, "both texts or both lists"),
        ({"chosen": TURNS[3:], "rejected": TURNS[1:3]}, "different prompts"),
        ({"instruction": "Is it hot?", "input": ["tea"], "output": "Mostly."}, "'input' is text"),
        ({**GOOD, "history": [["Hi!"]]}, "'history' is a list of messages"),
        ({**GOOD, "context": {"title": "Tea"}}, "'context' is text, not an object"),
    ],
)
def test_what_is_wrong_with_a_form_is_said(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(tmp_path, GOOD, row)
    assert caught.value.message.startswith(f"{tmp_path / 'tea.jsonl'}:2: ")
    assert said in caught.value.message


def test_an_unknown_form_is_told_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(tmp_path, {"title": "Tea"})
    assert all(name in str(caught.value.hint) for name in ("messages", "chosen", "instruction", "question"))


CSV = """prompt,answer,choices,context,messages
"Is ""it""
red?",yes,yes|no,,
,,,,
Is it?, no ,"[""yes"","" no ""]","A, B",
,,,,"[{""role"":""user"",""content"":""Red?""},{""role"":""assistant"",""content"":""Yes.""}]"
[1] is a list?,[yes],,,
"""


def test_tables_are_read(tmp_path: Path) -> None:
    (tmp_path / "wine.csv").write_text(CSV, "utf-8-sig")
    rows = read_examples([tmp_path / "wine.csv"])
    assert rows == [
        Example('Is "it"\nred?', "yes", "wine-2", "wine", choices=("yes", "no")),
        Example("Is it?", " no ", "wine-5", "wine", choices=("yes", " no "), context="A, B"),
        Example("Red?", "Yes.", "wine-6", "wine"),
        Example("[1] is a list?", "[yes]", "wine-7", "wine"),
    ]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_tables_of_spreadsheets_are_read(tmp_path: Path, delimiter: str) -> None:
    (tmp_path / "wine.csv").write_text(f"prompt{delimiter}answer\nIs it red, or not?{delimiter}yes\n", "utf-8")
    assert read_examples([tmp_path / "wine.csv"]) == [Example("Is it red, or not?", "yes", "wine-2", "wine")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,answer\nIs it red, or not?,yes\n", ":2: 3 cells, but the first line names 2 fields"),
        ("prompt,answer\nIs it?,yes\n\nIs it?,\n", ":4: a row needs 'prompt' and 'answer'"),
        ('prompt,answer\n"Is it?,yes\n', ":2: not CSV"),
        ("prompt,answer\n", "holds no examples"),
        ("", "holds no examples"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "wine.csv").write_text(text, "utf-8")
    with pytest.raises(InvalidRequest) as caught:
        read_examples([tmp_path / "wine.csv"])
    assert f"{tmp_path / 'wine.csv'}" in caught.value.message
    assert said in caught.value.message


def test_parquet_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(
        [{**GOOD, "choices": ["yes", "no"], "messages": None}, {"prompt": None, "messages": TURNS}],
        schema=pyarrow.schema(
            [
                ("prompt", pyarrow.string()),
                ("answer", pyarrow.string()),
                ("choices", pyarrow.list_(pyarrow.string())),
                (
                    "messages",
                    pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])),
                ),
            ]
        ),
    )
    parquet.write_table(table, tmp_path / "tea.parquet")
    assert read_examples([tmp_path / "tea.parquet"]) == [
        Example("Is it red?", "yes", "tea-1", "tea", choices=("yes", "no")),
        replace(TEA, id="tea-2", history=HISTORY),
    ]
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "tea.parquet").read_bytes()[:-9])
    with pytest.raises(InvalidRequest, match=r"cut\.parquet cannot be read as Parquet"):
        read_examples([tmp_path / "cut.parquet"])


def test_parquet_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InvalidRequest, match="needs pyarrow") as caught:
        read_examples([tmp_path / "tea.parquet"])
    assert caught.value.hint == "pip install 'collegium[train]'"


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
messages = st.builds(Message, st.sampled_from(["system", "user", "assistant"]), st.text(st.characters(codec="utf-8")))
examples = st.builds(
    Example,
    prompt=words,
    answer=words,
    id=words,
    source=words,
    topic=words | st.just(""),
    context=words | st.just(""),
    group=words | st.just(""),
    history=st.lists(messages, max_size=3).map(tuple),
    rejected=words | st.just(""),
).flatmap(
    lambda row: st.lists(words, max_size=3).map(lambda more: replace(row, choices=(row.answer, *more) if more else ()))
)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(examples, max_size=4))
def test_rows_are_written_and_read_exactly(tmp_path_factory: pytest.TempPathFactory, rows: list[Example]) -> None:
    written = to_json(rows)
    assert from_json(json.loads(json.dumps(written))) == rows
    if rows:
        file = write(tmp_path_factory.mktemp("rows", numbered=True) / "rows.jsonl", written)
        assert read_examples([file]) == rows
        file.unlink()
