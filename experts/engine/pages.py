"""Who holds which page of the key-value cache. Prompts that begin alike share their full pages.

Paging is PagedAttention's (Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with
PagedAttention"); finding a page by the hash of all that stands up to its end is vLLM's automatic prefix caching.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from .batch import PAGE


@dataclass(slots=True, eq=False)
class Reservation:
    """The pages of one sequence; empty from its release on."""

    pages: list[int]
    """In order: token `i` has its place `i % PAGE` in `pages[i // PAGE]`."""
    reused: int
    """Tokens at the beginning whose keys and values are there already."""
    full: int
    """Pages whose content `chain` has taken in."""
    chain: bytes
    """The hash of the key and of the tokens in those pages."""


class PagePool:
    """Hands out pages numbered from 0. Only the engine's thread may use it.

    A page is used (by one or more sequences), cached (by none, but its content is known and may be asked for again) or
    free. The cached page that was released longest ago is the first to be written over.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.hits = 0
        """Tokens of all prompts whose keys and values were there already."""
        self.asked = 0
        """Tokens of all prompts."""
        self._free = list(range(pages))
        self._users = [0] * pages
        self._known: dict[bytes, int] = {}  # page by the hash of its content
        self._hashes: dict[int, bytes] = {}  # the other way round
        self._cached: OrderedDict[int, None] = OrderedDict()  # known pages without users, next to leave first

    @property
    def free(self) -> int:
        """Pages whose content is worth nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages that nobody uses, but that may be reused."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Pages in reservations; one that is shared counts once."""
        return self.pages - self.free - self.cached

    def reserve(self, tokens: Sequence[int], total: int, key: str) -> Reservation | None:
        """Pages for a prompt that may grow to `total` tokens; None, and nothing changes, where too few are left.

        `key` names all that decides keys and values beside the tokens: pages are shared under equal keys alone. The last
        token of the prompt is never among the reused ones, because its logits are wanted.
        """
        shared, chain = self._find(tokens, key)
        new = -(-max(total, len(tokens)) // PAGE) - len(shared)
        if new > self.free + self.cached - sum(page in self._cached for page in shared):
            return None
        for page in shared:
            self._cached.pop(page, None)
            self._users[page] += 1
        reused = len(shared) * PAGE
        self.hits += reused
        self.asked += len(tokens)
        return Reservation([*shared, *(self._take() for _ in range(new))], reused, len(shared), chain)

    def filled(self, reservation: Reservation, tokens: Sequence[int], computed: int) -> None:
        """The first `computed` tokens of the sequence are written: its full pages may be shared from now on.

        Does nothing after the release.
        """
        for number in range(reservation.full, min(computed // PAGE, len(reservation.pages))):
            page = reservation.pages[number]
            reservation.chain = chain = _next(reservation.chain, tokens, number)
            reservation.full = number + 1
            if chain not in self._known:  # else another page holds the same, and goes on doing so
                self._known[chain] = page
                self._hashes[page] = chain

    def release(self, reservation: Reservation) -> None:
        """Give the pages back. They are taken out of the reservation, so a second release does nothing."""
        pages, reservation.pages = reservation.pages, []
        for page in reversed(pages):  # the end of a prompt is asked for less often than its beginning: it leaves first
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._hashes:
                self._cached[page] = None
            else:
                self._free.append(page)

    def _find(self, tokens: Sequence[int], key: str) -> tuple[list[int], bytes]:
        """The known pages that a prompt begins with, and the hash of what they hold."""
        pages: list[int] = []
        chain = hashlib.blake2b(key.encode(), digest_size=32).digest()
        for number in range((len(tokens) - 1) // PAGE):
            following = _next(chain, tokens, number)
            if following not in self._known:
                break
            pages.append(self._known[following])
            chain = following
        return pages, chain

    def _take(self) -> int:
        """A page for one user, free or from the cache."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._known[self._hashes.pop(page)]
        self._users[page] = 1
        return page


def _next(chain: bytes, tokens: Sequence[int], number: int) -> bytes:
    """The hash of page `number` and, through `chain`, of all that stands before it."""
    content = array("i", tokens[number * PAGE : (number + 1) * PAGE]).tobytes()
    return hashlib.blake2b(content, digest_size=32, key=chain).digest()
