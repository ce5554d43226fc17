"""One model of the engine: its decoder, its pages, its adapter slots, and the rows that run on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...errors import ContextTooLong, InvalidRequest
from .batch import MOST_PROMPT_TOKENS, PAGE, Batch, Decoder, Floats, Ints
from .canary import CANARY_PAGES, check_canary
from .lora import read_lora
from .pace import Pace
from .pages import PagePool, Reservation
from .request import Request, Row
from .slots import Adapter, AdapterSlots


@dataclass(slots=True, eq=False)
class Running:
    """A row in a model. The keys and values of the first `computed` of its tokens are in the cache."""

    model: Model
    tokens: list[int]
    """The prompt and what was drawn so far."""
    slot: int
    reservation: Reservation
    computed: int
    logits: Floats = field(init=False)
    """`[vocab]` what follows the last token, once `ready`."""
    pages: Ints = field(init=False)

    def __post_init__(self) -> None:
        self.pages = np.array(self.reservation.pages, np.int32)

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be drawn: one of an answer, several of a prompt that is being read."""
        return len(self.tokens) - self.computed

    @property
    def ready(self) -> bool:
        """Whether the next token can be drawn."""
        return len(self.tokens) == self.computed

    def append(self, token: int) -> None:
        """Go on with a drawn token."""
        self.tokens.append(token)

    def leave(self) -> None:
        """Give back what the row holds."""
        self.model.pool.release(self.reservation)
        self.model.slots.release(self.slot)


Planned = tuple[Running, int]
"""A row, and how many of its tokens a pass computes."""


class Model:
    """Runs rows in batches. Only the engine's thread may use it, but for `room` and `check`."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.pool = PagePool(decoder.pages - CANARY_PAGES)
        self.slots = AdapterSlots(decoder.slots, self._load)
        self._pace = Pace()
        self._checked: set[str] = set()  # versions whose canary has been seen alive

    def room(self, rows: int) -> int:
        """Tokens that fit a row, prompt and answer together, where `rows` run at once."""
        return min(self.decoder.shape.context, self.pool.pages // rows * PAGE)

    def check(self, rows: Sequence[Row], request: Request) -> None:
        """Raises ContextTooLong or InvalidRequest where these rows of a request could never run together."""
        room, vocab = self.room(len(rows)), self.decoder.shape.vocab
        for row in rows:
            if not row.prompt:
                raise InvalidRequest("A prompt has no tokens.", hint="Give at least one.")
            total = len(row.prompt) + request.new_tokens
            if total > room:
                raise ContextTooLong(
                    f"Prompt and answer take {total} tokens, and {room} fit.",
                    hint="Shorten it, ask for a shorter answer, or raise kv_cache_mb.",
                )
            tokens = (*row.prompt, *request.forced)
            if min(tokens) < 0 or max(tokens) >= vocab:
                raise InvalidRequest("A token is not the model's.", hint="Use its own tokenizer.")
        adapters = len({row.adapter.version for row in rows if row.adapter})
        if adapters > self.decoder.slots:
            raise InvalidRequest(f"{adapters} adapters are needed at once.", hint="Raise adapter_slots.")

    def start(self, row: Row, total: int) -> Running | None:
        """Take in a row that may grow to `total` tokens; None where pages or slots are short for now.

        Raises what reading its adapter raises.
        """
        slot = self.slots.acquire(row.adapter)
        if slot is None:
            return None
        reservation = self.pool.reserve(row.prompt, total, row.adapter.version if row.adapter else "")
        if reservation is None:
            self.slots.release(slot)
            return None
        return Running(self, list(row.prompt), slot, reservation, reservation.reused)

    def plan(self, rows: Sequence[Running]) -> list[Planned]:
        """What the next pass computes: the tokens of answers, and of prompts as many as let nobody wait for long."""
        answering = any(row.pending == 1 for row in rows)
        counts = share([row.pending for row in rows], self._pace.prompt_tokens if answering else MOST_PROMPT_TOKENS)
        planned = [(row, count) for row, count in zip(rows, counts, strict=True) if count]
        return sorted(planned, key=lambda one: one[0].slot)

    def run(self, planned: Sequence[Planned]) -> None:
        """One pass through the model."""
        reading = sum(count for row, count in planned if row.pending > 1)
        ready = [row for row, count in planned if count == row.pending]
        answering = any(row.pending == 1 for row, _ in planned)
        batch = _batch(planned)
        started = time.perf_counter()
        logits = self.decoder.forward(batch)
        if answering:
            self._pace.took(time.perf_counter() - started, reading)
        for row, count in planned:
            row.computed += count
            self.pool.filled(row.reservation, row.tokens, row.computed)
        for row, one in zip(ready, logits, strict=True):
            row.logits = one

    def _load(self, slot: int, adapter: Adapter) -> None:
        self.decoder.load(slot, read_lora(adapter.folder, adapter.version))
        if adapter.version not in self._checked and adapter.canary:
            check_canary(adapter.canary, self.decoder, slot, adapter.version)
            self._checked.add(adapter.version)


def share(pending: Sequence[int], prompt_tokens: int) -> list[int]:
    """How many tokens of each row are computed in one pass: of rows that wait for one token, that one.

    The others, which are reading their prompts, share `prompt_tokens` evenly, so that a short prompt does not wait for a long
    one; what one does not need is left to those that are longer. Where they are more than `prompt_tokens`, the longest wait.
    """
    reading = sorted((tokens, place) for place, tokens in enumerate(pending) if tokens > 1)
    counts = [min(tokens, 1) for tokens in pending]
    for number, (tokens, place) in enumerate(reading):
        fair = max(prompt_tokens // (len(reading) - number), min(prompt_tokens, 1))
        counts[place] = min(tokens, fair)
        prompt_tokens -= counts[place]
    return counts


def _batch(planned: Sequence[Planned]) -> Batch:
    pages = np.zeros((len(planned), max(len(row.pages) for row, _ in planned)), np.int32)
    tokens: list[int] = []
    positions: list[int] = []
    sequence: list[int] = []
    wanted: list[int] = []
    for number, (row, count) in enumerate(planned):
        pages[number, : len(row.pages)] = row.pages
        tokens += row.tokens[row.computed : row.computed + count]
        positions += range(row.computed, row.computed + count)
        sequence += [number] * count
        if count == row.pending:
            wanted.append(len(tokens) - 1)
    slots = [row.slot for row, _ in planned]
    flat = (np.array(one, np.int32) for one in (tokens, positions, sequence, slots, wanted))
    tokens_, positions_, sequence_, slots_, wanted_ = flat
    return Batch(tokens_, positions_, sequence_, pages, slots_, wanted_)
