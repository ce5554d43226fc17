"""Recipes: how an adapter is trained, found by name. A plug-in adds one through the entry point `collegium.recipes`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import InvalidRequest
from ...plugins import find

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BUILT_IN = {"lora-sft": "training.recipes.lora_sft:train"}
NEEDED = ("accelerate", "datasets", "trl")
"""What the extra `train` installs."""

Progress = Callable[[str, int, int], None]
"""Called with the stage, steps done and steps in all."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training row as token ids: the answer's tokens are the last `len(answer)` of the sequence."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Recipe(Protocol):
    """Trains an adapter on `rows` and writes a PEFT folder; returns what it measured (losses, tokens, options)."""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        rows: Sequence[Row],
        folder: Path,
        *,
        options: dict[str, Any],
        progress: Progress,
    ) -> dict[str, Any]:
        """Train; raises InvalidRequest for an option that the recipe does not know."""


def load_recipe(name: str) -> Recipe:
    """The recipe of this name; raises InvalidRequest that lists the known ones."""
    missing = [package for package in NEEDED if find_spec(package) is None]
    if name in BUILT_IN and missing:
        raise InvalidRequest(
            f"Training needs {', '.join(missing)}, not installed here.", hint="pip install 'collegium[train]'"
        )
    recipe: Recipe = find("collegium.recipes", name, BUILT_IN, f"There is no recipe {name!r}.")
    return recipe
