"""Tokens as a server names them, by id or by their text, and as this process numbers them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..engine.batch import Floats
from ..engine.request import BASE
from ..kinds import Host

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ID = "token_id:"
"""What vLLM writes before an id where it is asked for ids."""
_HALF = "\ufffd"

Named = Sequence[tuple[int | str, float]]
"""The likeliest tokens of one place as a server tells them: an id or a text, and its log-probability."""


@dataclass(frozen=True)
class Vocabulary:
    """`tokenizer` is nobody else's: what it takes for special is a state of its own. `width` is that of the models' logits."""

    tokenizer: PreTrainedTokenizerFast
    width: int

    @classmethod
    def of(cls, host: Host) -> Vocabulary:
        """That of the base model, which all small models share."""
        from ...models.load import load_tokenizer

        model = host.models.cached(BASE)
        config = json.loads((model.folder / "config.json").read_text("utf-8"))
        return cls(load_tokenizer(model), int(config["vocab_size"]))

    @property
    def end(self) -> int:
        """The id that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    @property
    def begin(self) -> int | None:
        """The id that some servers put before a text."""
        found = self.tokenizer.bos_token_id
        return None if found is None else int(found)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, special tokens written out."""
        return str(self.tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        """As a server would: special tokens in the text are special."""
        return list(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, tokens: Sequence[int]) -> str | None:
        """The text that reads as exactly these tokens; None where there is none, as in the middle of a character."""
        text = self.decode(tokens)
        return text if self.encode(text) == list(tokens) else None

    def nearly(self, tokens: Sequence[int]) -> str | None:
        """The text of these tokens, though it may be read as others that say the same.

        None in the middle of a character, and where special tokens would be read that are none, or the other way round.
        """
        text, special = self.decode(tokens), set(self.tokenizer.all_special_ids)
        meant, read = ([one for one in ids if one in special] for ids in (tokens, self.encode(text)))
        return text if meant == read and _HALF not in text else None

    def id(self, name: int | str) -> int | None:
        """The id of what a server names; None where that is no token here, or might be several."""
        if isinstance(name, str) and name.startswith(ID) and name.removeprefix(ID).isdecimal():
            name = int(name.removeprefix(ID))
        if isinstance(name, int):
            return name if 0 <= name < len(self) else None
        return self._ids.get(name)

    def row(self, named: Named) -> Floats:
        """Log-probabilities `[width]`, -inf for what was not told."""
        row = np.full(self.width, -np.inf, np.float32)
        for name, logprob in named:
            token = self.id(name)
            if token is not None:
                row[token] = logprob
        return row

    def share(self, names: Iterable[int | str]) -> float:
        """How many of the tokens that a server names are tokens here; texts that several tokens may have say nothing."""
        telling = [name for name in names if not (isinstance(name, str) and (not name or _HALF in name))]
        return sum(self.id(name) is not None for name in telling) / max(1, len(telling))

    @cached_property
    def _ids(self) -> dict[str, int]:
        texts = self.tokenizer.backend_tokenizer.decode_batch(
            [[one] for one in range(len(self))], skip_special_tokens=False
        )
        times = Counter(texts)
        return {text: one for one, text in enumerate(texts) if text and times[text] == 1 and _HALF not in text}
