"""Text to token ids, and a long text to windows of them.

Reads tokenizer.json with the library that transformers itself uses: importing transformers would be most of a start.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POSITIONS_START_LATE = {"camembert", "data2vec-text", "longformer", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"}
"""Kinds of models whose first position is the one after the padding token's id."""
SHORTEST = 512
"""Tokens that a model reads which does not say."""


class Windows:
    """A model's tokenizer, with room for `most` windows of `size` tokens, the special ones included.

    `size` is at most what the model was made for, which is also its default. Safe for several threads: the tokenizer's own
    cutting and padding are a state that all its callers share, so they are switched off, once, and done here.
    Raises UnsupportedModel for a tokenizer that exists in Python alone.
    """

    def __init__(self, folder: Path, size: int | None = None, most: int = 1) -> None:
        self._tokenizer = _tokenizer(folder)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._before, self._after = _special(self._tokenizer)
        self._most = most
        limit = _limit(folder)
        self.room = min(size or limit, limit) - len(self._before) - len(self._after)
        self.padding = _padding(folder)

    def __call__(self, text: str) -> list[list[int]]:
        """Token ids of the windows of `text`: one at least, and none of them empty.

        A text that fits in the windows is cut into as few as will do, of about equal length. Of a longer one, they are the
        beginning, the end, and what lies evenly between; where there is one, it is the beginning.
        """
        ids = self.tokens(text)
        needed = max(1, -(-len(ids) // self.room))
        if needed <= self._most:
            edges = [len(ids) * at // needed for at in range(needed + 1)]
            spans = list(pairwise(edges))
        else:
            last, gaps = len(ids) - self.room, max(1, self._most - 1)
            spans = [(start, start + self.room) for start in (last * at // gaps for at in range(self._most))]
        return [self.framed(ids[start:stop]) for start, stop in spans]

    def tokens(self, text: str) -> list[int]:
        """Token ids of the whole text, without the special ones."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def framed(self, ids: list[int]) -> list[int]:
        """A window of these, of which there is `room` for, with the special ones around them; never empty."""
        return [*self._before, *ids, *self._after] or [self.padding]


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of a model's folder holds; nothing where it is missing."""
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}


def _tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    if (file := folder / "tokenizer.json").exists():
        return Tokenizer.from_file(str(file))
    from transformers import AutoTokenizer

    slow: Any = AutoTokenizer.from_pretrained(folder)
    if not slow.is_fast:
        raise UnsupportedModel(
            f"The tokenizer in {folder} is a {type(slow).__name__}.", hint="Save it as a tokenizer.json."
        )
    backend: Tokenizer = slow.backend_tokenizer
    return backend


def _special(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text and after it."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    start = next(at for at in range(len(whole) + 1) if whole[at : at + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _padding(folder: Path) -> int:
    """The token that fills up a batch. It is masked, so any would do where the model does not say."""
    return int(read_json(folder / "config.json").get("pad_token_id") or 0)


def _limit(folder: Path) -> int:
    """Tokens that the model reads at most."""
    if stated := read_json(folder / "sentence_bert_config.json").get("max_seq_length"):
        return int(stated)
    config = read_json(folder / "config.json")
    positions = int(config.get("max_position_embeddings") or SHORTEST)
    if config.get("model_type") in POSITIONS_START_LATE:
        positions -= _padding(folder) + 1
    return min(positions, int(read_json(folder / "tokenizer_config.json").get("model_max_length") or positions))
