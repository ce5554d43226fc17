"""What one pass through a model is given, and what a model must be able to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .lora import LoraWeights
    from .shape import Shape

PAGE = 16
"""Tokens in one page of the key-value cache."""
MOST_PROMPT_TOKENS = 256
"""Tokens of prompts that one pass reads: more would not be faster, and newcomers wait for a pass."""
Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of several sequences side by side. T tokens, S sequences, W wanted places."""

    tokens: Ints
    """[T] ids; those of one sequence stand together, in order."""
    positions: Ints
    """[T] places in their sequences, from 0."""
    sequence: Ints
    """[T] the sequence of each token: a row of `pages` and of `slots`; ascending."""
    pages: Ints
    """[S, most] pages of each sequence, in order; padded with 0."""
    slots: Ints
    """[S] adapter slot of each sequence, ascending; 0 is no adapter."""
    wanted: Ints
    """[W] places in `tokens` whose logits are wanted."""


class Decoder(Protocol):
    """A language model in memory, with its key-value cache and its adapter slots."""

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        ...

    @property
    def precision(self) -> str:
        """`float32`, `bfloat16` or `int8`."""
        ...

    @property
    def pages(self) -> int:
        """Pages of the key-value cache."""
        ...

    @property
    def slots(self) -> int:
        """Slots for adapters, the empty slot 0 not counted."""
        ...

    @property
    def page_bytes(self) -> int:
        """Bytes of the key-value cache that one page takes, all layers together."""
        ...

    def forward(self, batch: Batch) -> Floats:
        """Logits `[W, vocab]`; the keys and values of every token are written into its sequence's pages."""
        ...

    def load(self, slot: int, lora: LoraWeights) -> None:
        """Put an adapter into a slot (from 1), in place of what was there. Raises ArtifactCorrupt where it does not fit."""
        ...

    def close(self) -> None:
        """Free what does not free itself."""
        ...
