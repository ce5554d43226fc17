"""What commands have in common: what was given to all of them, settings, the home, progress bars."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .experts.home import Home
    from .models.fetch import Progress
    from .settings import Settings

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

given: dict[str, Any] = {}
"""The options before the command: `home` and `quiet`."""


def load_settings(**flags: Any) -> Settings:
    """The settings of this command line; `flags` that are None are not given. Raises SettingsError."""
    from .settings import Settings

    return Settings.load(home=given.get("home"), **flags)


@contextmanager
def open_home(settings: Settings | None = None) -> Iterator[Home]:
    """The home, closed at the end. Raises SettingsError."""
    from .experts.home import Home

    with Home(settings or load_settings()) as home:
        yield home


@contextmanager
def reporting() -> Iterator[Progress]:
    """A bar on standard error for each long piece of work, with the time left; silent where nobody looks."""
    from .console import progress_bars

    with progress_bars(quiet=bool(given.get("quiet"))) as report:
        yield report


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """A recipe's options from NAME=VALUE, values as JSON where they are. Raises InvalidRequest."""
    from .errors import InvalidRequest

    out: dict[str, Any] = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found or not name:
            raise InvalidRequest(f"--option {pair!r} is not NAME=VALUE.")
        try:
            out[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            out[name.replace("-", "_")] = value
    return out
