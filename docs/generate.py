"""Write docs/commands.md from the command line and the settings themselves; `--check` says whether it is up to date."""

from __future__ import annotations

import ast
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union

from typer import Typer
from typer.models import ArgumentInfo, OptionInfo

from collegium import settings
from collegium.cli import app

TARGET = Path(__file__).with_name("commands.md")
INTRODUCTION = """\
# Commands and settings

`python docs/generate.py` writes this page from the code; `make check` fails where it is out of date.

A command ends with exit status 0, or with 1 and a sentence on standard error that says what was wrong and, where it can be
said, what to do. Exit status 2 means that the command line was not understood, 130 that Ctrl-C stopped it. Progress bars go
to standard error, answers to standard output. `--help` after any command shows what this page says about it.
"""
SETTINGS = """\
## Settings

A setting comes from `collegium.toml` in the home folder (or the file that `COLLEGIUM_CONFIG` names), then from the environment
variable of its name with the prefix `COLLEGIUM_`, then from a command's option; later ones win. An unknown name is an error
that lists the known ones. `COLLEGIUM_DATA` is no setting: it names the data of the benchmarks and of `training/ship.sh`.

| setting | environment variable | values | default | meaning |
|---|---|---|---|---|
"""
OPTIONS = "| name | value | default | meaning |\n|---|---|---|---|\n"
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
Info = OptionInfo | ArgumentInfo


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` compare; returns the exit status."""
    if "--check" not in arguments:
        TARGET.write_text(page(), "utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text("utf-8") == page():
        return 0
    sys.stderr.write(f"docs/{TARGET.name} is out of date: run `python docs/generate.py`.\n")
    return 1


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_sections(app, "collegium"), SETTINGS + "".join(_settings())])


def _sections(group: Typer, name: str) -> Iterator[str]:
    if group.registered_callback and group.registered_callback.callback:
        yield _section(name, group.registered_callback.callback, "COMMAND ...")
    for command in group.registered_commands:
        assert command.callback
        if not command.hidden:
            yield _section(f"{name} {command.name or command.callback.__name__}", command.callback, "")
    for child in group.registered_groups:
        assert child.typer_instance
        yield from _sections(child.typer_instance, f"{name} {child.name}")


def _section(name: str, function: Callable[..., Any], rest: str) -> str:
    options, arguments, rows = False, [], []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind, info = _unpack(parameter.annotation)
        required = parameter.default is parameter.empty
        if info and info.hidden:
            continue
        if isinstance(info, OptionInfo):
            options, shown = True, " ".join(f"`{one}`" for one in _names(parameter.name, kind, info))
        else:
            shown = f"`{parameter.name.upper()}`"
            usage = shown.strip("`") + (" ..." if _many(kind) else "")
            arguments.append(usage if required else f"[{usage}]")
        default = "required" if required else _default(parameter.default)
        rows.append(f"| {shown} | {_value(kind, info)} | {default} | {(info and info.help) or ''} |\n")
    usage = " ".join(part for part in (name, "[OPTIONS]" if options else "", *arguments, rest) if part)
    table = f"\n{OPTIONS}{''.join(rows)}" if rows else ""
    return f"## `{name}`\n\n{inspect.getdoc(function)}\n\n```text\n{usage}\n```\n{table}"


def _unpack(annotation: Any) -> tuple[Any, Info | None]:
    if typing.get_origin(annotation) is not typing.Annotated:
        return annotation, None
    kind, info = typing.get_args(annotation)
    return kind, info


def _names(name: str, kind: Any, info: OptionInfo) -> list[str]:
    # In `Annotated[bool, Option("--json")]` Typer's signature takes the first name for a default.
    given = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]
    dashed = name.replace("_", "-")
    return given or [f"--{dashed}", *([f"--no-{dashed}"] if kind is bool else [])]


def _value(kind: Any, info: Info | None) -> str:
    word = {bool: "", int: "number", float: "number", Path: "path"}.get(_inner(kind), "text")
    low, high = (info.min, info.max) if info else (None, None)
    word += f" from {low:g}" if low is not None else ""
    word += f" to {high:g}" if high is not None else ""
    return f"{word}, repeatable" if _many(kind) else word


def _many(kind: Any) -> bool:
    return any(typing.get_origin(part) is list for part in (kind, *typing.get_args(kind)))


def _inner(kind: Any) -> Any:
    """`Path` of `list[Path] | None`."""
    if typing.get_origin(kind) in (Union, UnionType, list):
        return _inner(next(part for part in typing.get_args(kind) if part is not NoneType))
    return kind


def _default(value: object) -> str:
    return "" if value is None or value is False or value == "" else f"`{value}`"


def _settings() -> Iterator[str]:
    meanings = _field_docs(Path(inspect.getfile(settings)))
    for name, field in settings.Settings.model_fields.items():
        # The default home depends on the machine that writes this page.
        default = "the user's data folder" if field.default_factory else _setting_default(field.default)
        bounds = [
            f"{sign} {getattr(one, key):g}"
            for one in field.metadata
            for key, sign in BOUNDS.items()
            if hasattr(one, key)
        ]
        values = " ".join([_setting_values(field.annotation), " and ".join(bounds)]).strip()
        variable = f"{settings.PREFIX}{name.upper()}"
        yield f"| `{name}` | `{variable}` | {values} | {default} | {meanings.get(name, '')} |\n"


def _setting_values(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    words = {bool: "`true`, `false`", int: "whole number", float: "number", Path: "path"}
    return words.get(_inner(kind), "text")


def _setting_default(value: object) -> str:
    return f"`{str(value).lower()}`" if isinstance(value, bool) else _default(value)


def _field_docs(source: Path) -> dict[str, str]:
    """The string that stands below a field of Settings, by field."""
    classes = [node for node in ast.parse(source.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
    body = next(node for node in classes if node.name == "Settings").body
    out = {}
    for field, after in pairwise(body):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                out[name] = " ".join(text.split())
    return out


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
