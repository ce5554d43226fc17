"""A saved and loaded index finds what brute force finds, and a damaged one says what is wrong."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collegium.errors import ArtifactCorrupt, InvalidRequest
from collegium.retrieval import Chunk, Index, build_index

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

DIMENSION = 256


def encode(texts: Sequence[str]) -> NDArray[np.float32]:
    rows = np.full((len(texts), DIMENSION), 1e-3, dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        for word in text.lower().split():
            row[zlib.crc32(word.encode("utf-8", "replace")) % DIMENSION] += 1
    normal: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normal


def chunks_of(texts: Sequence[str]) -> list[Chunk]:
    return [Chunk(text, f"{number % 3}.txt", (number, number + len(text))) for number, text in enumerate(texts)]


TEXTS = [
    f"the {animal} sees the {thing}"
    for animal in ("cat", "dog", "cow", "hen", "ape")
    for thing in ("sun", "sea", "hill")
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_index(chunks_of(TEXTS), encode, tmp_path / "index", encoder_id="bag-of-words")
    return tmp_path / "index"


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(st.characters(), min_size=1) | st.sampled_from(TEXTS), min_size=1, max_size=70),
    st.text("abc the", max_size=20) | st.sampled_from(TEXTS),
    st.integers(-1, 80),
    st.floats(-1, 1),
)
def test_search_is_brute_force(tmp_path: Path, texts: list[str], query: str, k: int, floor: float) -> None:
    chunks = chunks_of(texts)
    build_index(chunks, encode, tmp_path, encoder_id="bag-of-words")
    index = Index.load(tmp_path, "animals@1")
    vector = encode([query])[0]
    found = index.search(vector, k, floor)
    scores = encode(texts) @ vector
    expected = sorted((score for score in scores if score >= floor + 1e-5), reverse=True)[: max(k, 0)]
    np.testing.assert_allclose([passage.score for passage in found][: len(expected)], expected, atol=1e-5)
    assert len(found) <= max(k, 0)
    assert all(passage.score >= floor for passage in found)
    for passage in found:
        at = passage.span[0]
        assert Chunk(passage.text, passage.document, passage.span) == chunks[at]
        assert passage.score == pytest.approx(scores[at], abs=1e-5)
        assert (passage.page, passage.index_version) == (None, "animals@1")


def test_an_index_knows_its_size_documents_and_encoder(folder: Path) -> None:
    index = Index.load(folder, "v")
    assert len(index) == len(TEXTS)
    assert index.documents == ("0.txt", "1.txt", "2.txt")
    assert index.encoder_id == "bag-of-words"
    assert index.search(encode(["the cow sees the sea"])[0], 1)[0].text == "the cow sees the sea"


def test_equal_input_gives_equal_bytes(folder: Path, tmp_path: Path) -> None:
    build_index(chunks_of(TEXTS), encode, tmp_path / "again", encoder_id="bag-of-words")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["index.faiss", "meta.json", "passages.jsonl"]
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_progress_is_told_in_batches_and_ends_at_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    sizes: list[int] = []

    def counting(texts: Sequence[str]) -> NDArray[np.float32]:
        sizes.append(len(texts))
        return encode(texts)

    chunks = chunks_of(["some words"] * 75)
    build_index(chunks, counting, tmp_path, encoder_id="e", progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == list(np.cumsum(sizes))
    assert len(calls) > 1
    assert calls[-1] == (75, 75)


def test_nothing_to_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="nothing to index"):
        build_index([], encode, tmp_path / "index", encoder_id="e")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("shape", [(DIMENSION + 1,), (1, DIMENSION), ()])
def test_a_vector_of_another_encoder_is_refused(folder: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match="shape"):
        Index.load(folder, "v").search(np.zeros(shape, dtype=np.float32), 3)


def test_a_vector_that_is_not_a_number_finds_nothing(folder: Path) -> None:
    assert Index.load(folder, "v").search(np.full(DIMENSION, np.nan, dtype=np.float32), 3) == ()


def drop_a_line(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def claim_a_terabyte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[37:45] = (2**38).to_bytes(8, "little")
    path.write_bytes(data)


def set_dimension(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dimension": 7}))


def another_kind(path: Path) -> None:
    import faiss

    faiss.write_index(faiss.IndexFlatL2(DIMENSION), str(path))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("index.faiss", Path.unlink, "index.faiss.*No such file"),
        ("passages.jsonl", Path.unlink, "passages.jsonl.*No such file"),
        ("meta.json", Path.unlink, "meta.json.*No such file"),
        ("index.faiss", lambda path: path.write_bytes(b"not an index " * 9), "index.faiss.*not a FAISS index"),
        ("index.faiss", lambda path: path.write_bytes(b""), "index.faiss.*not a FAISS index"),
        ("index.faiss", cut, "index.faiss.*a part of it is missing"),
        ("index.faiss", claim_a_terabyte, "index.faiss.*its header is wrong"),
        ("index.faiss", another_kind, "index.faiss.*not a FAISS index of the kind IndexFlatIP"),
        ("passages.jsonl", drop_a_line, "passages differ.*says 15.*has 14.*has 15"),
        ("passages.jsonl", cut, "passages.jsonl.*line"),
        ("passages.jsonl", lambda path: path.write_text('{"text": "a"}\n'), "line 1 is not a passage"),
        ("meta.json", lambda path: path.write_text("[]"), "meta.json.*not the meta data"),
        ("meta.json", set_dimension, "256 numbers.*says 7"),
    ],
)
def test_damage_is_named(folder: Path, name: str, damage: Callable[[Path], object], said: str) -> None:
    damage(folder / name)
    with pytest.raises(ArtifactCorrupt, match=said) as caught:
        Index.load(folder, "v")
    assert caught.value.hint
