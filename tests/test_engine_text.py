from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.experts.engine.text import TextStream
from collegium.models.cache import CachedModel
from collegium.models.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny"))


chunked = st.lists(st.binary(min_size=1, max_size=3), max_size=12)


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """Valid UTF-8, cut into tokens anywhere, in the middle of characters too."""
    data = draw(st.text(st.sampled_from("ab ü日😀\n\ufffd"), max_size=12)).encode()
    cuts = sorted(draw(st.sets(st.integers(0, len(data)), max_size=len(data))) | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(cuts)]


def run(pieces: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    def decode(ids: list[int]) -> str:
        return b"".join(pieces[one] for one in ids).decode("utf-8", "replace")

    stream = TextStream(decode, stop)
    out = []
    for token in range(len(pieces)):
        out.append(stream.push(token))
        if stream.stopped:
            break
    return [*out, stream.finish()], stream.stopped


@given(streams())
def test_pieces_add_up_and_never_hold_half_a_character(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    out, stopped = run(pieces)
    assert "".join(out) == data.decode()
    assert not stopped
    assert "".join(out).count("\ufffd") == data.decode().count("\ufffd")


@given(streams(), st.integers(0, 5))
def test_an_answer_that_ends_within_a_character_is_the_decoded_whole(pieces: list[bytes], cut: int) -> None:
    data = b"".join(pieces)[: -cut or None]
    shorter = [piece for piece in (data[start : start + 2] for start in range(0, len(data), 2)) if piece]
    assert "".join(run(shorter)[0]) == data.decode("utf-8", "replace")


@given(chunked)
def test_bytes_that_are_no_text_add_up_too(pieces: list[bytes]) -> None:
    assert "".join(run(pieces)[0]) == b"".join(pieces).decode("utf-8", "replace")


@given(streams(), st.text(st.sampled_from("ab ü日😀\n"), min_size=1, max_size=4))
def test_nothing_is_shown_from_a_stop_string_on(pieces: list[bytes], stop: str) -> None:
    whole = b"".join(pieces).decode()
    out, stopped = run(pieces, [stop])
    assert "".join(out) == whole.split(stop)[0]
    assert stopped == (stop in whole)


@given(streams(), st.lists(st.text(st.sampled_from("ab ü日😀\n"), max_size=4), max_size=4))
def test_of_several_stop_strings_none_is_shown(pieces: list[bytes], stops: list[str]) -> None:
    whole = b"".join(pieces).decode()
    out, stopped = run(pieces, stops)
    assert whole.startswith("".join(out))
    assert not any(stop and stop in "".join(out) for stop in stops)
    assert stopped == any(stop and stop in whole for stop in stops)


@given(st.text(st.sampled_from("ab ü日😀\nthe"), max_size=30))
def test_the_tokenizers_own_pieces_add_up(tokenizer: PreTrainedTokenizerFast, said: str) -> None:
    stream = TextStream(lambda ids: str(tokenizer.decode(ids)))
    ids = tokenizer.encode(said)
    assert "".join([*(stream.push(token) for token in ids), stream.finish()]) == said
