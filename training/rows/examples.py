"""Examples: rows that say what an expert should answer. docs/examples.md has their forms and fields."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...errors import InvalidRequest
from ...schema import Message
from .row_files import FORMATS, records
from .row_forms import fields_of


@dataclass(frozen=True, slots=True)
class Example:
    """One row. `choices` is the closed set of answers, `context` what to answer from, `source` the data set it is from.

    Rows of one `group` (a document, a patient) are never on both sides of a split. `history` are the turns before `prompt`,
    a system message among them. With `rejected` the row is a preference pair: `answer` is preferred to it.
    """

    prompt: str
    answer: str
    id: str
    source: str
    topic: str = ""
    choices: tuple[str, ...] = ()
    context: str = ""
    group: str = ""
    history: tuple[Message, ...] = ()
    rejected: str = ""


def read_examples(paths: Iterable[Path], *, limit: int | None = None) -> list[Example]:
    """Read files of rows, at most `limit` rows of each: the same ones every time, drawn from the whole file.

    Raises InvalidRequest that names the file, the line and what is wrong with it.
    """
    rows = []
    for path in paths:
        read = list(_read_file(path))
        if not read:
            raise InvalidRequest(f"{path} holds no examples.", hint=FORMATS)
        # Files are often sorted by answer: their first rows would not show what the task is.
        rows += read if limit is None or limit >= len(read) else random.Random(len(read)).sample(read, limit)
    return rows


def to_json(rows: Iterable[Example]) -> list[dict[str, Any]]:
    """JSON-ready rows; `from_json` reads them back exactly. Empty fields are left out."""
    names = [field.name for field in fields(Example)]
    written = []
    for row in rows:
        values = {name: getattr(row, name) for name in names}
        history = [{"role": one.role, "content": one.content} for one in row.history]
        values = {**values, "choices": list(row.choices), "history": history}
        written.append({name: value for name, value in values.items() if value})
    return written


def from_json(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Read what `to_json` wrote."""
    empty = {"prompt": "", "answer": "", "id": "", "source": ""}
    return [
        Example(
            **{
                **empty,
                **row,
                "choices": tuple(row.get("choices", ())),
                "history": tuple(Message(one["role"], one["content"]) for one in row.get("history", ())),
            }
        )
        for row in rows
    ]


def _read_file(path: Path) -> Iterator[Example]:
    source = path.name.split(".")[0]
    for number, record in records(path):
        try:
            given = fields_of(record)
        except InvalidRequest as error:
            raise InvalidRequest(f"{path}:{number}: {error.message}", hint=error.hint) from None
        yield Example(**{"id": f"{source}-{number}", "source": source, **given})
