"""What can be chosen by name: built in, or from a package that names it as an entry point. Both come through this door."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from .errors import InvalidRequest


def find(group: str, name: str, built_in: Mapping[str, str], unknown: str) -> Any:
    """The object of this name, imported when it is asked for. `built_in` has `module:attribute` by name, below `collegium`.

    Raises InvalidRequest with the sentence `unknown` and the names that are known; what an import raises goes through.
    """
    if name in built_in:
        module, _, attribute = built_in[name].partition(":")
        return getattr(import_module(f"{__package__}.{module}"), attribute)
    plugins = {entry.name: entry for entry in entry_points(group=group)}
    if name not in plugins:
        raise InvalidRequest(unknown, hint=f"Known: {', '.join(sorted({*built_in, *plugins}))}.")
    return plugins[name].load()
