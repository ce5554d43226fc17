"""Which adapter is in which slot of the decoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...schema import Canary


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT folder under the name of its content."""

    version: str
    folder: Path
    canary: Canary | None = None


class AdapterSlots:
    """Slots from 1 to `count`, filled on demand; slot 0 is no adapter. Only the engine's thread may use it.

    `load` puts an adapter into a slot, in place of what was there.
    """

    def __init__(self, count: int, load: Callable[[int, Adapter], None]) -> None:
        self._load = load
        self._empty = list(range(count, 0, -1))
        self._slots: OrderedDict[str, int] = OrderedDict()  # slot by version, the least recently used first
        self._pins = [0] * (count + 1)

    @property
    def resident(self) -> list[str]:
        """The versions in slots, the least recently used first."""
        return list(self._slots)

    @property
    def used(self) -> int:
        """Slots that are pinned."""
        return sum(pins > 0 for pins in self._pins)

    def acquire(self, adapter: Adapter | None) -> int | None:
        """The slot of an adapter, which stays in it until it is released as often as it was acquired; 0 for None.

        None where every slot is pinned. Raises what `load` raises; the slot is then empty.
        """
        if adapter is None:
            return 0
        slot = self._slots.get(adapter.version)
        if slot is None:
            slot = self._fill(adapter)
            if slot is None:
                return None
        self._slots.move_to_end(adapter.version)
        self._pins[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """Take one pin off a slot. The adapter stays until its slot is needed."""
        if slot:
            assert self._pins[slot], f"slot {slot} was released more often than acquired"
            self._pins[slot] -= 1

    def _fill(self, adapter: Adapter) -> int | None:
        if not self._empty:
            oldest = next((version for version, slot in self._slots.items() if not self._pins[slot]), None)
            if oldest is None:
                return None
            self._empty.append(self._slots.pop(oldest))  # before the load, which may fail half-way
        slot = self._empty[-1]
        self._load(slot, adapter)
        self._slots[adapter.version] = self._empty.pop()
        return slot
