"""An adapter that was made elsewhere: checked, measured by the same gate as one that was trained here, and registered."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import ArtifactCorrupt, GateRefused, InvalidRequest, UnsupportedModel
from ..experts.adapters import WEIGHTS, store_adapter
from ..experts.artifacts import ArtifactStore
from ..experts.engine.kernels import MAX_RANK
from ..experts.engine.lora import read_lora
from ..experts.home import Home
from ..experts.portable import CARD
from ..models.cache import CachedModel, sha256
from ..models.fetch import fetch
from ..models.names import parse_name
from ..schema import Card, Evidence, Lora, Score, card_from_dict
from .domain import NewDomain
from .register import check_names, live_lora, register
from .rows.examples import Example, read_examples
from .rows.wording import close_labels
from .watch import Progress

MOST_BYTES = 2 << 30
"""Of an adapter's weights: rank 256 on all linears of an 8 B model takes less in bfloat16."""
ROUTER_PROMPTS = 400
"""Prompts of the test files that the router learns a new domain from, at most."""


@dataclass(frozen=True, slots=True)
class Import:
    """What to import and as what. `source` is a PEFT folder, or hf:org/name or pypi:package==version/path.

    `test_limit` is the rows taken of each test file.
    """

    source: str
    name: str
    domain: str = ""
    test: tuple[Path, ...] = ()
    test_limit: int = 100
    description: str = ""
    licence: str = ""
    force: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What measuring said: `gate` for the card, and whether it passed."""

    gate: str
    passed: bool
    scores: tuple[Score, ...]


def import_expert(plan: Import, home: Home, progress: Progress) -> Card:
    """Check, measure and register an adapter; returns its card.

    Raises InvalidRequest or UnsupportedModel where it is no adapter that the engine serves on this base model, or where nothing
    says how good it is and it is not forced; GateRefused with the numbers where it is not better; and what fetching raises.
    """
    domain = plan.domain or plan.name
    check_names(home, plan.name, domain)
    if not plan.test and not plan.force:
        raise InvalidRequest(
            f"Nothing says how good {plan.name} is.",
            hint="Name --test files with prompt and answer, or take it unmeasured with --force, which its card will say.",
        )
    rows = read_examples(plan.test, limit=plan.test_limit)
    base = home.models.get(home.settings.base_model, progress)
    with tempfile.TemporaryDirectory(dir=home.root, prefix=".import-") as scratch:
        given = fetched(plan.source, Path(scratch) / "source", home, progress)
        progress("checking the adapter", 0, 0)
        adapter, lora = check_adapter(given, base, Path(scratch))
        told = _told(given)
        result = _judged(plan, domain, rows, home, base, adapter, lora, progress)
        known = None if rows else _measured_before(home, plan.name, domain, lora, base)
        evidence = known or _evidence(plan, adapter, told, result)
        about = NewDomain(domain, evidence.description, prompts=tuple(row.prompt for row in rows[:ROUTER_PROMPTS]))
        system = told.system if told else None
        return register(
            home, about, name=plan.name, adapter=adapter, evidence=evidence, system=system, progress=progress
        )


def fetched(source: str, folder: Path, home: Home, progress: Progress) -> Path:
    """The folder of a source: a user's own as it is, others fetched into `folder`. Raises what `fetch` raises too."""
    try:
        name = parse_name(source)
    except InvalidRequest:
        raise InvalidRequest(
            f"{source!r} is not where an adapter can be.",
            hint="Name a PEFT folder that exists, hf:org/name or pypi:package==version/path.",
        ) from None
    if name.source == "folder":
        return Path(name.location)
    folder.mkdir()
    fetch(name, folder, timeout=home.settings.fetch_timeout, progress=progress)
    return folder


def check_adapter(folder: Path, base: CachedModel, scratch: Path) -> tuple[Path, Lora]:
    """Copy the two files that count, once they are found to be plain LoRA of this base model; returns folder and spec.

    Raises InvalidRequest or UnsupportedModel that says what stands in the way. Pickled weights are never read.
    """
    weights = folder / WEIGHTS
    if not weights.is_file() and (pickled := sorted(path.name for path in folder.glob("adapter_model.*"))):
        raise UnsupportedModel(
            f"{folder} holds {', '.join(pickled)} and no {WEIGHTS}.",
            hint="Save the adapter with safe_serialization: pickled weights are never loaded.",
        )
    if weights.is_file() and (size := weights.stat().st_size) > MOST_BYTES:
        raise InvalidRequest(
            f"{weights} has {size / 2**20:,.0f} MB.", hint=f"An adapter has at most {MOST_BYTES >> 20:,} MB."
        )
    store = ArtifactStore(scratch / "store")  # thrown away: what the gate refuses leaves nothing in the home
    lora = store_adapter(folder, base, store, scratch / "files")
    checked = store.path(lora.adapter)
    try:
        rank = read_lora(checked, "that is imported").rank
    except ArtifactCorrupt as error:  # nobody registered it yet: the source is to blame
        raise InvalidRequest(error.message, hint="Save it again, in bfloat16, float16 or float32.") from None
    if rank > MAX_RANK:
        raise UnsupportedModel(f"The adapter is of rank {rank}.", hint=f"Supported: up to {MAX_RANK}.")
    return checked, lora


def measure_import(
    domain: str,
    held_out: Sequence[Example],
    base: CachedModel,
    adapters: Mapping[str, Path | None],
    home: Home,
    progress: Progress,
) -> Result:
    """Measure the adapters, in the words of `measure.measure`, and judge the candidate as one that was trained here."""
    from ..models.chat import ChatEncoder
    from ..models.load import load_tokenizer
    from .measuring.gate import decide
    from .measuring.lookup import lookup
    from .measuring.measure import measure

    context = lookup(home, domain, ChatEncoder(load_tokenizer(base)))
    measured = measure(domain, held_out, base, adapters, home.settings, progress, context=context)
    verdicts = decide(measured)
    return Result(str(verdicts), verdicts.passed, measured.scores())


def _judged(
    plan: Import,
    domain: str,
    rows: Sequence[Example],
    home: Home,
    base: CachedModel,
    adapter: Path,
    lora: Lora,
    progress: Progress,
) -> Result:
    if not rows:
        return Result("not measured", False, ())
    adapters: dict[str, Path | None] = {"candidate": adapter, "base": None}
    live = live_lora(home, domain, base)
    if live and live.adapter != lora.adapter:  # its own is measured anew
        adapters["live"] = home.artifacts.verify(live.adapter)
    result = measure_import(domain, close_labels(rows, rows), base, adapters, home, progress)
    if not result.passed and not plan.force:
        raise GateRefused(
            f"{plan.name} is {result.gate}. It was not registered.",
            hint="Register it all the same with --force, which its card will say.",
        )
    return result


def _evidence(plan: Import, adapter: Path, told: Card | None, result: Result) -> Evidence:
    """What is known of it here. Scores are those that were measured here, whatever an exported card says of them."""
    about = told.evidence if told else Evidence()
    origin: dict[str, Any] = {"name": "import", "source": place(plan.source), "sha256": sha256(adapter / WEIGHTS)}
    if about.recipe:
        origin["trained"] = {key: value for key, value in about.recipe.items() if key != "trained"}
    return Evidence(
        description=plan.description or about.description,
        scores=result.scores,
        gate=result.gate,
        forced=not result.passed,
        recipe=origin,
        data={**about.data, **{f"{path.parent.name}/{path.name}": sha256(path) for path in plan.test}},
        licence=plan.licence or about.licence,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _measured_before(home: Home, name: str, domain: str, lora: Lora, base: CachedModel) -> Evidence | None:
    """What this home has measured of the very same expert, which an import without rows must not forget."""
    for card in home.registry.cards():
        if (card.name, card.domain, card.spec, card.base) == (
            name,
            domain,
            lora,
            base.identity,
        ) and card.evidence.scores:
            return card.evidence
    return None


def place(source: str) -> str:
    """The source as a card may tell it: of a folder the last part alone, for the rest says nothing to others."""
    name = parse_name(source)
    return f"folder {Path(name.location).name}" if name.source == "folder" else source


def _told(folder: Path) -> Card | None:
    """What an exported folder says of itself; None where it is none. Raises InvalidRequest where its card cannot be read."""
    if not (folder / CARD).is_file():
        return None
    try:
        return card_from_dict(json.loads((folder / CARD).read_text("utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"{folder / CARD} is not the card of an exported expert: {error}.", hint="Delete it, or export again."
        ) from None
