"""Make the small model of a pair from any base model: leave layers out, then teach what is left to expect what the base expects.

What comes out is the list of layers that are kept and an adapter: a few megabytes, stored as an artifact. docs/proxy.md says
what it is for, and what was measured.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InvalidRequest
from ...experts.home import Home
from ...experts.shrunk import ADAPTER, Shrunk, cut
from ...models.cache import CachedModel, sha256
from ...models.chat import ChatEncoder
from ...models.load import load_lm, load_tokenizer, pick_device
from ...schema import ARTIFACT, Message, digest
from ..recipes import Progress
from ..rows.examples import Example, read_examples
from ..rows.wording import ask
from ..stages import Stages
from ..tuning.adapter_folder import save_adapter
from .distil import Distilling, Tokens, distil, measure
from .layers import check_layers, choose_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = (".txt", ".md")
HELD_OUT = 20
"""Without test files, one text in so many is held out to measure with."""
MEASURED_TEXTS = 64
CHOOSING_TEXTS, CHOOSING_TOKENS = 10, 128
"""How many texts, of at most how many tokens, layers are chosen on: each of N^2 / 2 candidates reads them."""


@dataclass(frozen=True, slots=True)
class Shrinking:
    """What to make: so many `layers` of `model`, taught on the rows or paragraphs of `text`; `limit` is rows of each file."""

    model: str
    layers: int
    text: tuple[Path, ...]
    test: tuple[Path, ...] = ()
    limit: int | None = None
    distilling: Distilling = field(default_factory=Distilling)


def shrink(plan: Shrinking, home: Home, progress: Progress) -> tuple[str, dict[str, Any]]:
    """Choose layers, distil, store: returns the name of the small model, `artifact:HASH`, and what was measured.

    A job that is run again goes on where it was. Raises InvalidRequest where the plan cannot be carried out, before anything
    long begins, and what fetching and loading the model raise.
    """
    if find_spec("accelerate") is None:
        raise InvalidRequest("Shrinking needs accelerate, not installed here.", hint="pip install 'collegium[train]'")
    base = home.models.get(plan.model, progress)
    check_layers(plan.layers, base)
    texts, held_out = _split(plan, ChatEncoder(load_tokenizer(base)))
    stages = Stages(home.root / "jobs" / _job(plan, base))

    def load() -> PreTrainedModel:
        import torch

        return load_lm(base, device=pick_device(home.settings.device), dtype=torch.bfloat16)

    def choosing(folder: Path) -> dict[str, Any]:
        rng = random.Random(plan.distilling.seed)
        sample = [text[:CHOOSING_TOKENS] for text in rng.sample(texts, min(CHOOSING_TEXTS, len(texts)))]
        return {"layers": choose_layers(load(), plan.layers, sample, progress)}

    def distilling(folder: Path) -> dict[str, Any]:
        shrunk, teacher = Shrunk(base.identity, tuple(choice["layers"])), load()
        student = cut(base, shrunk.layers).to(teacher.device, teacher.dtype)
        taught, report = distil(teacher, student, texts, checkpoints, plan.distilling, progress)
        save_adapter(taught, folder / "shrunk" / ADAPTER)
        shrunk.save(folder / "shrunk")
        return {**report, **measure(teacher, taught, held_out, progress)}

    _, choice = stages.run("layers", choosing)
    checkpoints = stages.root / "checkpoints"  # outside of the stage, which begins anew with an empty folder
    folder, report = stages.run("distil", distilling)
    name = ARTIFACT + home.artifacts.put(folder / "shrunk")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return name, {"layers": choice["layers"], **asdict(plan.distilling), **report}


def _split(plan: Shrinking, chat: ChatEncoder) -> tuple[list[Tokens], list[Tokens]]:
    """Texts to teach with and texts to measure with, as token ids."""
    texts = _read(plan.text, plan, chat)
    if plan.test:
        held_out = _read(plan.test, plan, chat)
        return texts, held_out[:MEASURED_TEXTS]
    held = min(MEASURED_TEXTS, max(1, len(texts) // HELD_OUT))
    if len(texts) <= held:
        raise InvalidRequest("One text is too few: some are learned from, others are held out.", hint="Give hundreds.")
    return texts[held:], texts[:held]


def _read(paths: Sequence[Path], plan: Shrinking, chat: ChatEncoder) -> list[Tokens]:
    """Rows of JSON lines as a question and its answer, other files by the paragraph; shuffled."""
    rng, longest = random.Random(plan.distilling.seed), plan.distilling.max_tokens
    texts: list[Tokens] = []
    for path in paths:
        if path.suffix in PLAIN:
            long = [chat.text(part) for part in _paragraphs(path)]
            texts += [ids[at : at + longest] for ids in long for at in range(0, len(ids), longest)]
        else:
            texts += [_turns(row, chat, rng)[:longest] for row in read_examples([path], limit=plan.limit)]
    texts = [text for text in texts if len(text) > 1]
    if not texts:
        raise InvalidRequest("There is no text to learn from.", hint="Name .jsonl, .jsonl.gz, .txt or .md files.")
    rng.shuffle(texts)
    return texts


def _turns(row: Example, chat: ChatEncoder, rng: random.Random) -> Tokens:
    turns = [Message("user", ask(row, rng=rng)), Message("assistant", row.answer)]
    return chat.encode(turns, add_generation_prompt=False)


def _paragraphs(path: Path) -> list[str]:
    try:
        return [part for part in re.split(r"\n\s*\n", path.read_text("utf-8")) if part.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read as text: {error}.") from None


def _job(plan: Shrinking, base: CachedModel) -> str:
    """The folder of the job: the same plan on the same files goes on in the same folder."""
    files = [[sha256(path) for path in paths] for paths in (plan.text, plan.test)]
    return f"shrink-{digest([base.identity, plan.layers, plan.limit, asdict(plan.distilling), files])[:12]}"
