"""Rows are read as they were meant, and what is wrong with one is said by file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import InvalidRequest
from collegium.training.examples import Example, read_examples

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
