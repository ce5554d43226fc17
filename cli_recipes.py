"""The commands of recipes: `recipes list`."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import typer

from .cli_shared import AsJson

if TYPE_CHECKING:
    from .training.recipes import Recipe

recipes = typer.Typer(help="The ways to train an adapter.", no_args_is_help=True)


@recipes.callback()
def _group() -> None:
    """Keeps `list` a command of its own while it is the only one."""


@recipes.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """Name the recipes, built in and plugged in, with what they need and their options."""
    from .training.recipes import known, load_recipe

    found = {name: _described(load_recipe(name)) for name in known()}
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for name, about in found.items():
        options = ", ".join(f"{option}={json.dumps(default)}" for option, default in about["options"].items())
        typer.echo(f"{name}: {about['about']}\n  needs {' and '.join(about['needs'])}\n  {options}")


def _described(recipe: Recipe) -> dict[str, Any]:
    options = {field.name: field.default for field in fields(recipe.options)}
    return {"about": recipe.about, "needs": list(recipe.needs), "options": options}
