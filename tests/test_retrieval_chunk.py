"""Chunks are slices of their document, whatever it holds."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.retrieval import Chunk, Document, chunk

PIECES = ["a", "aa", "ab", " ", "  ", "\n", "\n\n", "\n \n", "\n# ", "\n## x", "```\n", "\n---\n", ". ", "! ", "\t"]
ODD = [*PIECES, "\x1c", "\u2028", "\u00a0", "é", "e\u0301", "漢字", "\N{FAMILY}\u200d", "\ud800", "\0", "word and word"]
texts = st.one_of(st.text(), st.lists(st.sampled_from(ODD), max_size=80).map("".join))
repeats = st.builds(lambda piece, times: piece * times, st.text("ab \n.#", min_size=1, max_size=9), st.integers(1, 90))
sizes = st.integers(2, 60).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1)))


@given(st.one_of(texts, repeats), st.sampled_from(["a.txt", "a.md", "README"]), sizes)
def test_chunks_are_slices_that_cover_the_text(text: str, name: str, sizes: tuple[int, int]) -> None:
    size, overlap = sizes
    chunks = chunk(Document(name, text), size, overlap)
    covered: set[int] = set()
    for piece in chunks:
        start, end = piece.span
        assert text[start:end] == piece.text
        assert piece.document == name
        assert piece.text.strip() == piece.text != ""
        assert len(piece.text) <= size
        covered.update(range(start, end))
    assert all(at in covered or character.isspace() for at, character in enumerate(text))
    for one, two in pairwise(chunks):
        assert one.span[0] <= two.span[0]
        assert one.span[1] - two.span[0] <= overlap


def test_a_short_document_is_one_chunk() -> None:
    assert chunk(Document("a.txt", "\n Hello there. \n")) == [Chunk("Hello there.", "a.txt", (2, 14))]


@pytest.mark.parametrize("text", ["", " \n\t \n", "\n" * 5000])
def test_white_space_makes_no_chunk(text: str) -> None:
    assert chunk(Document("a.txt", text)) == []


def test_markdown_is_cut_at_its_headings() -> None:
    body = "Some words of the body. " * 20
    text = f"# One\n{body}\n# Two\n{body}"
    starts = [piece.text[:5] for piece in chunk(Document("a.md", text), 600, 60)]
    assert starts == ["# One", "# Two"]


def test_a_heading_stays_with_the_paragraph_after_it() -> None:
    body = "One long line of words without an end " * 12
    chunks = chunk(Document("a.md", f"## Refunds\n\n{body}\n\n## Orders\n\n{body}"), 300, 60)
    assert not any(piece.text in ("## Refunds", "## Orders") for piece in chunks)
    assert any(piece.text.startswith("## Refunds\n\nOne long line") for piece in chunks)


def test_a_cut_paragraph_repeats_its_last_sentences() -> None:
    text = " ".join(f"This is sentence number {number:02}." for number in range(40))
    chunks = chunk(Document("a.txt", text), 300, 60)
    assert len(chunks) > 3
    for one, two in pairwise(chunks):
        assert two.text.startswith("This is sentence number")
        assert one.text.endswith(".")
        assert 0 < one.span[1] - two.span[0] <= 60


def test_repeated_text_is_located_exactly() -> None:
    text = "ab " * 400
    *_, last = chunk(Document("a.txt", text), 100, 30)
    assert last.span[1] == len(text.rstrip())
