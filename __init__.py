"""Collegium: many domain experts behind one endpoint.

>>> from collegium import Collegium
>>> with Collegium.open() as collegium:
...     reply = collegium.chat("What is a tort?")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import CollegiumError
from .schema import Card, Decision, Delta, Message, Passage, Release, Reply, Sampling
from .settings import Settings

if TYPE_CHECKING:
    from .runtime import Answer, Collegium

__all__ = [
    "Answer",
    "Card",
    "Collegium",
    "CollegiumError",
    "Decision",
    "Delta",
    "Message",
    "Passage",
    "Release",
    "Reply",
    "Sampling",
    "Settings",
]


def __getattr__(name: str) -> object:
    """`Collegium` and `Answer` are loaded when they are first named: importing the package loads no model library."""
    if name in {"Answer", "Collegium"}:
        from . import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
