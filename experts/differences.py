"""What changed between two versions: facts on their cards, and what their adapters add to each linear.

An adapter adds (alpha / r) B A to a linear (Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021). With the
scaling in B, inner products of two such sums need r x r matrices alone: <B1 A1, B2 A2> = sum((B1' B2) * (A1 A2')), element by
element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.cache import CachedModel
from ..schema import Base, Card, Lora, Proxy, Remote, card_to_dict
from .artifacts import ArtifactStore
from .engine.lora import LoraWeights, read_lora
from .engine.weights import Weights

Module = tuple[int, str]
"""A layer and a linear ("q_proj")."""


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """`change` is |D2 - D1| / |D1| by Frobenius norms, or / |W| beside an adapter that leaves the weights W as they are.

    `cosine` is that of D1 and D2, None where one is zero.
    """

    module: str
    change: float
    cosine: float | None


@dataclass(frozen=True, slots=True)
class DeltaChange:
    """The same over all modules, and each of those that change, the most changed first. `against` says what |...| divides by."""

    change: float
    cosine: float | None
    against: str
    modules: tuple[ModuleChange, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """Two cards with the bytes of their artifacts; `deltas` is None where there is nothing to compare, and `why` says why."""

    cards: tuple[Card, Card]
    sizes: tuple[int, int]
    deltas: DeltaChange | None
    why: str = ""

    def facts(self) -> list[tuple[str, str, str]]:
        """What stands on the cards but scores: the name of a field and both values, in the order of the cards."""
        one, other = (_flat(card) for card in self.cards)
        rows = [(name, one.get(name, ""), other.get(name, "")) for name in dict.fromkeys([*one, *other])]
        return [*rows, ("size", *(f"{size / 1e6:.1f} MB" for size in self.sizes))]  # type: ignore[list-item]


def difference(one: Card, other: Card, artifacts: ArtifactStore, weight_norm: Callable[[Module], float]) -> Difference:
    """Compare two cards. `weight_norm` gives the Frobenius norm of the base model's own linear.

    Raises ArtifactCorrupt where an adapter is damaged.
    """
    sizes = (_bytes(one, artifacts), _bytes(other, artifacts))
    adapters = [_adapter(card, artifacts) for card in (one, other)]
    if not any(adapters):
        return Difference((one, other), sizes, None, "neither has an adapter")
    models = {_model(card) for card, adapter in zip((one, other), adapters, strict=True) if adapter}
    if len(models) > 1:
        return Difference((one, other), sizes, None, "their adapters are of different models")
    if not all(adapters) and models != {("base", one.base)}:
        return Difference((one, other), sizes, None, "the adapter is of a small model, not of the base model")
    return Difference((one, other), sizes, compare(adapters[0], adapters[1], weight_norm))


def compare(one: LoraWeights | None, other: LoraWeights | None, weight_norm: Callable[[Module], float]) -> DeltaChange:
    """How what `other` adds differs from what `one` adds; None adds nothing."""
    first, second = (weights.modules if weights else {} for weights in (one, other))
    rows, before, after, both, basis = [], 0.0, 0.0, 0.0, 0.0
    for module in sorted({*first, *second}):
        square = _inner(first, first, module)
        inner, squared = _inner(first, second, module), _inner(second, second, module)
        weight = square if first and second else weight_norm(module) ** 2
        change = math.sqrt(max(square + squared - 2 * inner, 0.0))  # rounding may leave less than nothing
        rows.append(ModuleChange(_name(module), _ratio(change, math.sqrt(weight)), _cosine(inner, square, squared)))
        before, after, both, basis = before + square, after + squared, both + inner, basis + weight
    whole = math.sqrt(max(before + after - 2 * both, 0.0))
    against = "what A's adapter adds" if first and second else "the base model's weights"
    ranked = sorted(rows, key=lambda row: -row.change)
    return DeltaChange(_ratio(whole, math.sqrt(basis)), _cosine(both, before, after), against, tuple(ranked))


def _inner(one: Mapping[Module, Any], other: Mapping[Module, Any], module: Module) -> float:
    """<B1 A1, B2 A2>, without ever making either: r x r matrices, in float64 for the differences of such sums."""
    if module not in one or module not in other:
        return 0.0
    (a1, b1), (a2, b2) = ([half.double() for half in adapter[module]] for adapter in (one, other))
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def _ratio(change: float, basis: float) -> float:
    return change / basis if basis else (math.inf if change else 0.0)


def _cosine(inner: float, square: float, squared: float) -> float | None:
    return max(-1.0, min(1.0, inner / math.sqrt(square * squared))) if square and squared else None


def _name(module: Module) -> str:
    return f"layers.{module[0]}.{module[1]}"


def _adapter(card: Card, artifacts: ArtifactStore) -> LoraWeights | None:
    if not isinstance(card.spec, Lora | Proxy | Remote):
        return None
    return read_lora(artifacts.verify(card.spec.adapter), card.spec.adapter[:12])


def _model(card: Card) -> tuple[str, str]:
    """The model that a card's adapter belongs to."""
    return (card.spec.small if isinstance(card.spec, Proxy | Remote) else "base"), card.base


def _bytes(card: Card, artifacts: ArtifactStore) -> int:
    return sum(_tree(artifacts.path(version)) for version in card.spec.artifacts)


def _tree(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _flat(card: Card) -> dict[str, str]:
    """The card's fields by dotted names, but for scores and canary; empty ones are left out."""
    body = card_to_dict(card)
    evidence = {name: one for name, one in body.pop("evidence").items() if name not in ("scores", "canary")}
    kind = {} if isinstance(card.spec, Base) else body["spec"]
    fields = {"version": card.version, "kind": card.spec.kind, **body, "spec": kind, **evidence}
    return {name: str(value) for name, value in _dotted("", fields) if value not in ("", None, False)}


def _dotted(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(prefix, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value)]
    return [pair for key, one in value.items() for pair in _dotted(f"{prefix}.{key}" if prefix else str(key), one)]


def base_norms(base: CachedModel) -> Callable[[Module], float]:
    """The Frobenius norms of a model's own linears, read when they are asked for."""

    def norm(module: Module) -> float:
        with Weights(base.folder) as weights:
            return float(weights.linear(*module)[0].double().norm())

    return norm
