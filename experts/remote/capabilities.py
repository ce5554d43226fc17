"""What a server can do: found by asking it, never assumed from its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self


@dataclass(frozen=True, slots=True)
class Capabilities:
    """`Evidence.capabilities` keeps them on the card.

    - `completions`: it goes on with a text that is given; `native`: it does so by llama.cpp's own `/completion`.
    - `chat`: it answers conversations.
    - `token_ids`: a prompt may be token ids; `by_id`: it names tokens by id when it is asked to.
    - `begins`: it puts the token that begins a text before one by itself.
    - `top_k`: the log-probabilities that it gives a place; `whole`: those are all there are.
    - `prompt_logprobs`: how it tells those of a prompt's tokens: in a `field` of their own (vLLM), by `echo`, or not at all.
    - `bias`: a token can be forbidden without a change of the log-probabilities: then the end of an answer does not hide them.
    """

    completions: bool = False
    native: bool = False
    chat: bool = False
    token_ids: bool = False
    by_id: bool = False
    begins: bool = False
    top_k: int = 0
    whole: bool = False
    prompt_logprobs: Literal["none", "field", "echo"] = "none"
    bias: bool = False

    @property
    def mode(self) -> str:
        """How an expert at such a server answers, unless its card says otherwise."""
        if not self.top_k:
            return "remote-text"
        return "remote-full" if self.whole else "remote-topk"

    def as_dict(self) -> dict[str, Any]:
        """For the card."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What a card has; what another version of this program found besides is left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})
