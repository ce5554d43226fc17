"""Files of rows: JSON lines, CSV and Parquet, each read as (line, record)."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import InvalidRequest

FORMATS = "Examples are read from .jsonl, .jsonl.gz, .csv and .parquet files."
_DELIMITERS = (",", ";", "\t")
_AT_ONCE = 1024
_LISTS = ("messages", "conversations", "chosen", "rejected", "history")


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a file, each with its line (in a Parquet file: its row), counted from 1.

    A record of JSON lines is whatever JSON the line holds. Those of CSV and Parquet are dicts without their empty cells.
    Raises InvalidRequest that names the file, and the line where there is one.
    """
    read = {".csv": _from_csv, ".parquet": _from_parquet}.get(path.suffix.lower(), _from_json_lines)
    try:
        yield from read(path)
    except FileNotFoundError:
        raise InvalidRequest(f"{path} does not exist.", hint=FORMATS) from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} cannot be read as text: {error}.", hint="Save it in UTF-8.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}.", hint=FORMATS) from None


def _from_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise InvalidRequest(f"{path}:{number}: not JSON: {error}.", hint=FORMATS) from None
            yield number, record


def _from_csv(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        head = lines.readline()
        lines.seek(0)
        # Spreadsheets of many countries write semicolons and call it CSV.
        delimiter = max(_DELIMITERS, key=head.count)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        names: list[str] = []
        line = 1
        try:
            for cells in reader:
                if not names:
                    names = [name.strip() for name in cells]
                elif any(cell.strip() for cell in cells):
                    yield line, _record(names, cells, f"{path}:{line}")
                line = reader.line_num + 1
        except csv.Error as error:
            raise InvalidRequest(f"{path}:{line}: not CSV: {error}.", hint="Close every quoted cell.") from None


def _record(names: list[str], cells: list[str], where: str) -> dict[str, str]:
    if len(cells) > len(names):
        raise InvalidRequest(
            f"{where}: {len(cells)} cells, but the first line names {len(names)} fields.",
            hint='Put cells that hold a delimiter or a line break in quotes ("").',
        )
    row = {name: cell for name, cell in zip(names, cells, strict=False) if cell.strip()}
    return {name: _listed(name, cell) for name, cell in row.items()}


def _listed(name: str, cell: str) -> Any:
    """The list that a cell has as text: JSON, or choices with | between them; other cells as they are."""
    if name in (*_LISTS, "choices") and cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except json.JSONDecodeError:
            pass  # a rejected answer may begin with a bracket
    return [choice.strip() for choice in cell.split("|")] if name == "choices" else cell


def _from_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InvalidRequest(
            f"{path}: Parquet needs pyarrow, not installed here.", hint="pip install 'collegium[train]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(_AT_ONCE):
                for record in batch.to_pylist():
                    number += 1
                    yield number, {name: value for name, value in record.items() if value is not None}
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read as Parquet: {error}.") from None
