"""Documents cut into pieces that are small enough to embed and to quote."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

from .documents import Document

MARKDOWN_SUFFIXES = (".md", ".markdown")
SENTENCE = r"(?<=[.!?]) "
NEW_PART = re.compile(r"\n[^\S\n]*\n|\n#{1,6} ")
"""Where a paragraph or a section begins, nothing was cut in two."""
LEAD_STARTS = (re.compile(r"[.!?]\s+"), re.compile(r"\s+"))


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document: `text == document_text[span[0]:span[1]]`, in characters; `document` is its name."""

    text: str
    document: str
    span: tuple[int, int]


def chunk(document: Document, size: int = 900, overlap: int = 120) -> list[Chunk]:
    """Cut at sections, paragraphs, lines, sentences or words: the largest unit that fits `size` characters.

    A chunk that begins within a paragraph repeats up to `overlap` characters of what precedes it. Every character that
    is not white space lies in some chunk, and no chunk is white space alone. `overlap` must be smaller than `size`.
    """
    text = document.text
    chunks = []
    for start, end in _with_lead(text, _cut(document, size - overlap), overlap):
        piece = text[start:end].strip()
        if piece:
            begin = text.index(piece[0], start)  # the first character that is not white space
            chunks.append(Chunk(piece, document.name, (begin, begin + len(piece))))
    return chunks


def _cut(document: Document, size: int) -> list[tuple[int, int]]:
    """Spans that follow each other without a gap.

    The splitter's own start indexes are found by searching, and repeated text makes them point too early. Pieces that
    neither overlap nor are stripped add up to the text, so their lengths say exactly where they are.
    """
    from langchain_text_splitters import Language, RecursiveCharacterTextSplitter

    separators = ["\n\n", "\n", " ", ""]
    if PurePath(document.name).suffix.lower() in MARKDOWN_SUFFIXES:
        separators = RecursiveCharacterTextSplitter.get_separators_for_language(Language.MARKDOWN)
    splitter = RecursiveCharacterTextSplitter(
        separators=[*separators[:-2], SENTENCE, *separators[-2:]],
        is_separator_regex=True,
        chunk_size=size,
        chunk_overlap=0,
        strip_whitespace=False,
    )
    spans, start = [], 0
    for piece in splitter.split_text(document.text):
        spans.append((start, start + len(piece)))
        start += len(piece)
    return spans


def _with_lead(text: str, spans: list[tuple[int, int]], overlap: int) -> list[tuple[int, int]]:
    """Each span begins up to `overlap` characters earlier.

    A span no longer than `overlap` (a heading before a long paragraph) joins the next one: alone, it would be found by
    its words and answer nothing.
    """
    result = []
    held: int | None = None
    for start, end in spans:
        own = start if held is None else held
        if end - own <= overlap and end < len(text):
            held = own
            continue
        result.append((_lead(text, start, overlap) if held is None else held, end))
        held = None
    return result


def _lead(text: str, start: int, overlap: int) -> int:
    """Find where the repetition before `start` begins: at a sentence, else a word, else `overlap` characters before."""
    earliest = max(0, start - overlap)
    if start == 0 or NEW_PART.match(text, start):
        return start
    for pattern in LEAD_STARTS:
        if found := pattern.search(text, earliest, start):
            return found.end()
    return earliest
