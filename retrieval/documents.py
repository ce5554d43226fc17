"""Files and folders read as text, with a plain sentence for everything that was left out."""

from __future__ import annotations

import codecs
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SUFFIXES = (".txt", ".md", ".markdown", ".rst")
MAX_BYTES = 20 * 1024 * 1024
HINT = f"Give text files ({', '.join(SUFFIXES)}, or text without an extension) or folders that hold some."
REASONS_SHOWN = 5
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
ASCII = bytes(range(128))
NOT_CONTROL = bytes(range(32, 256)) + b"\t\n\r\f\v"
FOREIGN_SHARE = 0.3
"""Western text in an 8-bit code is mostly ASCII; above this share of other bytes, Windows-1252 is the wrong guess."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the name that citations show: its path within the folder that was given, or its file name."""

    name: str
    text: str


def read_documents(paths: Iterable[Path]) -> tuple[list[Document], list[str]]:
    r"""Read files and whole folders (recursively, in order of name, without hidden files).

    Line ends become `\n`; a file that is reached twice is read once. The second value has one sentence for each file
    or folder that was not read, and for each that was read in a guessed encoding. Raises InvalidRequest where a path
    does not exist or nothing could be read.
    """
    reading = _Reading()
    for path in paths:
        if _is_folder(path):
            reading.add_folder(path.resolve())
        else:
            reading.add(path.name, path)
    if not reading.documents:
        shown = reading.notes[:REASONS_SHOWN]
        more = len(reading.notes) - len(shown)
        reasons = [*shown, f"{more} more were not read."] if more else shown
        raise InvalidRequest(" ".join(["There is no text to read.", *reasons]), hint=HINT)
    return reading.documents, reading.notes


def _is_folder(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        raise InvalidRequest(f"{printable(path)} does not exist.", hint=HINT) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise InvalidRequest(f"{printable(path)} cannot be read: {_reason(error)}.", hint=HINT) from None
    return path.is_dir()


@dataclass(slots=True)
class _Reading:
    """What has been read so far; one for each call."""

    documents: list[Document] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    seen: set[Path] = field(default_factory=set)

    def add_folder(self, root: Path) -> None:
        for path in sorted(self._walk(root)):
            self.add(str(path.relative_to(root)), path, root)

    def _walk(self, root: Path) -> Iterator[Path]:
        def unreadable(error: OSError) -> None:
            self._skip(printable(Path(error.filename).relative_to(root)), _reason(error))

        for folder, folders, files in os.walk(root, onerror=unreadable):
            folders[:] = [name for name in folders if not name.startswith(".")]
            # `os.walk` does not descend into a link; yielded like a file, it gets its sentence.
            links = [name for name in folders if Path(folder, name).is_symlink()]
            yield from (Path(folder, name) for name in [*files, *links] if not name.startswith("."))

    def add(self, name: str, path: Path, root: Path | None = None) -> None:
        name = printable(name)
        try:
            target = _target(path, root)
            if target in self.seen:
                return
            text, encoding = _decode(_read(target))
        except InvalidRequest as error:
            self._skip(name, error.message)
            return
        except OSError as error:
            self._skip(name, _reason(error))
            return
        self.seen.add(target)
        if encoding:
            self.notes.append(f"{name} was read as {encoding}, since it is not UTF-8.")
        self.documents.append(Document(self._unique(name), text))

    def _skip(self, name: str, reason: str) -> None:
        self.notes.append(f"{name} was not read: {reason}.")

    def _unique(self, name: str) -> str:
        """Two folders may hold the same relative path, and a citation must tell them apart."""
        unique, count = name, 1
        while unique in self.names:
            count += 1
            unique = f"{name} ({count})"
        self.names.add(unique)
        return unique


def _target(path: Path, root: Path | None) -> Path:
    """Find the regular file of an accepted type behind `path`; raises InvalidRequest with the reason against it.

    A path that the caller named may be a link to anywhere; one found in a folder may not leave that folder.
    """
    try:
        target = path.resolve()
    except RuntimeError:  # Python's way to say ELOOP, until 3.13
        raise InvalidRequest("it is a link to itself") from None
    if root is not None and not target.is_relative_to(root):
        raise InvalidRequest("it is a link that leads out of the folder")
    if not target.exists():
        raise InvalidRequest("it is a link to nothing")
    if target.is_dir():
        raise InvalidRequest("it is a link to a folder")
    if not target.is_file():  # a pipe would block for ever
        raise InvalidRequest("it is not a regular file")
    if path.suffix and path.suffix.lower() not in SUFFIXES:
        raise InvalidRequest(f"files of type {path.suffix} are not supported")
    return target


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InvalidRequest(f"it is larger than {MAX_BYTES // 2**20} MB")
    return data


def _decode(data: bytes) -> tuple[str, str | None]:
    """Return the text, and its encoding where that was guessed; raises InvalidRequest for what is not text."""
    text, guessed = _characters(data)
    if not text.strip():
        raise InvalidRequest("it is empty")
    if "\0" in text:
        raise InvalidRequest("it is a binary file")
    return text.replace("\r\n", "\n").replace("\r", "\n"), guessed


def _characters(data: bytes) -> tuple[str, str | None]:
    try:
        if data.startswith(UTF16_MARKS):
            return data.decode("utf-16"), None
        return data.decode("utf-8-sig"), None
    except UnicodeDecodeError:
        pass
    if data.translate(None, delete=NOT_CONTROL):
        raise InvalidRequest("it is a binary file")
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        text = ""
    if not text or len(data.translate(None, delete=ASCII)) > FOREIGN_SHARE * len(data):
        raise InvalidRequest("its encoding is not UTF-8")
    return text, "Windows-1252"


def printable(name: str | Path) -> str:
    """Return the name as valid Unicode on one line: a file name may hold any byte."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(name))


def _reason(error: OSError | ValueError) -> str:
    strerror = error.strerror if isinstance(error, OSError) else None
    text = strerror or str(error)
    return text[:1].lower() + text[1:]
