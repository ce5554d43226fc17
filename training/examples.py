"""Examples: rows of JSON lines that say what an expert should answer. docs/examples.md has their schema."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Example:
    """One row. `choices` is the closed set of answers, `context` what to answer from, `source` the data set it is from."""

    prompt: str
    answer: str
    id: str
    source: str
    topic: str = ""
    choices: tuple[str, ...] = ()
    context: str = ""


_TEXT_FIELDS = tuple(field.name for field in dataclasses.fields(Example) if field.name != "choices")


def read_examples(paths: Iterable[Path], *, limit: int | None = None) -> list[Example]:
    """Read `.jsonl` or `.jsonl.gz` files, at most `limit` rows of each: the same ones every time, drawn from the whole file.

    Raises InvalidRequest that names the file, the line and what is wrong with it.
    """
    rows = []
    for path in paths:
        read = list(_read_file(path))
        if not read:
            raise InvalidRequest(
                f"{path} holds no examples.", hint="Each line is a JSON object with prompt and answer."
            )
        # Files are often sorted by answer: their first rows would not show what the task is.
        rows += read if limit is None or limit >= len(read) else random.Random(len(read)).sample(read, limit)
    return rows


def _read_file(path: Path) -> Iterator[Example]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _read_row(line, f"{path}:{number}", path.name.split(".")[0], number)
    except FileNotFoundError:
        raise InvalidRequest(f"{path} does not exist.", hint="Name .jsonl or .jsonl.gz files.") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InvalidRequest(f"{path} cannot be read as JSON lines: {error}.") from None


def _read_row(line: str, where: str, source: str, number: int) -> Example:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{where}: not JSON: {error}.") from None
    if not isinstance(row, dict) or not all(
        isinstance(row.get(key), str) and row[key].strip() for key in ("prompt", "answer")
    ):
        raise InvalidRequest(f"{where}: a row needs 'prompt' and 'answer', both text that is not empty.")
    choices = row.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise InvalidRequest(f"{where}: 'choices' is a list of texts, none of them empty.")
    if choices and row["answer"] not in choices:
        raise InvalidRequest(f"{where}: the answer {row['answer']!r} is not among the choices.")
    given = {key: str(row[key]) for key in _TEXT_FIELDS if row.get(key) is not None}
    fields: dict[str, Any] = {"id": f"{source}-{number}", "source": source, **given, "choices": tuple(choices)}
    return Example(**fields)
