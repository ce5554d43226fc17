from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import UnsupportedModel
from collegium.models.cache import ModelCache
from collegium.models.windows import Windows
from collegium.settings import DEFAULT_ENCODER
from collegium.tests.encoder_models import KINDS, POSITIONS, tiny_encoder_of, tokens_by_transformers

TEXTS = [
    "what is a court",
    "",
    "the fever is prime. " * 60,  # longer than the model sees
    "What IS Übermut 日本 <unk> [SEP] </s>",
    "\n\t ",
    " the  double  space",
]
FIRST, LAST = 2, 3  # [CLS] and [SEP] of the tiny encoder


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = tiny_encoder_of(kind, tmp_path)
    for size in (7, None):
        limit = size or (POSITIONS - 2 if kind == "Roberta" else POSITIONS)
        cut = Windows(model.folder, size)
        assert [cut(text) for text in TEXTS] == [[ids] for ids in tokens_by_transformers(model, TEXTS, limit)]


def test_a_folder_with_a_vocabulary_alone_is_read_too(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "old")
    vocabulary = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)), "utf-8")
    about = {"tokenizer_class": "BertTokenizer", "model_max_length": 128, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), "utf-8")
    assert [Windows(folder)(text) for text in TEXTS] == [Windows(tiny_encoder)(text) for text in TEXTS]


def test_a_tokenizer_in_python_alone_is_refused_by_name(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "slow")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CanineTokenizer"}), "utf-8")
    with pytest.raises(UnsupportedModel, match="CanineTokenizer"):
        Windows(folder)


@given(words=st.integers(0, 90), size=st.integers(3, 40), most=st.integers(1, 6))
def test_windows_cover_a_text_from_its_beginning_to_its_end(
    tiny_encoder: Path, words: int, size: int, most: int
) -> None:
    numbers = [f"{number % 10}" for number in range(words)]
    ids = Windows(tiny_encoder, 64, 99)(" ".join(numbers))
    content = [one for window in ids for one in window[1:-1]]
    windows = Windows(tiny_encoder, size, most)(" ".join(numbers))
    inner = [window[1:-1] for window in windows]
    assert all(window[0] == FIRST and window[-1] == LAST and len(window) <= size for window in windows)
    needed = max(1, -(-words // (size - 2)))
    assert len(windows) == min(needed, most)
    if needed <= most:
        assert [one for window in inner for one in window] == content
        assert max(map(len, inner)) - min(map(len, inner)) <= 1
    else:
        assert all(len(window) == size - 2 for window in inner)
        assert inner[0] == content[: size - 2]
        if most > 1:
            assert inner[-1] == content[2 - size :]


def test_windows_between_lie_evenly(tiny_encoder: Path) -> None:
    text = " ".join("abcdefghijklmnopqrstuvwxyz")
    windows = Windows(tiny_encoder, 5, 3)(text)
    letters = [Windows(tiny_encoder)(letter)[0][1] for letter in "abcdefghijklmnopqrstuvwxyz"]
    assert [[letters.index(one) for one in window[1:-1]] for window in windows] == [
        [0, 1, 2],
        [11, 12, 13],
        [23, 24, 25],
    ]


def test_no_window_is_longer_than_the_model_reads(tiny_encoder: Path) -> None:
    assert [len(window) for window in Windows(tiny_encoder, 999, 2)("court " * 500)] == [64, 64]


def test_a_tokenizer_that_adds_nothing_makes_no_empty_window(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "bare")
    body = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(body | {"post_processor": None}), "utf-8")
    assert Windows(folder)("") == [[0]]
    assert Windows(folder)("court") == [Windows(tiny_encoder)("court")[0][1:-1]]


def test_a_caller_may_cut_a_text_itself(tiny_encoder: Path) -> None:
    cut = Windows(tiny_encoder, 5)
    ids = cut.tokens("what is a court of the python")
    assert len(ids) > cut.room == 3
    assert cut.framed(ids[2:5]) == [FIRST, *ids[2:5], LAST]


@pytest.mark.models
def test_the_real_tokens_are_those_of_transformers(real_home: Path) -> None:
    model = ModelCache(real_home / "models").get(DEFAULT_ENCODER)
    assert [Windows(model.folder)(text) for text in TEXTS] == [
        [ids] for ids in tokens_by_transformers(model, TEXTS, 256)
    ]
