"""Measure an adapter beside its base, and beside who is live, as they would serve: in one engine, on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from ...errors import ContextTooLong
from ...experts.engine.engine import Engine
from ...experts.engine.request import Row
from ...experts.engine.slots import Adapter
from ...models.cache import CachedModel, ModelCache
from ...models.chat import ChatEncoder
from ...schema import Score
from ...settings import Settings
from ..rows.examples import Example
from ..rows.wording import ask
from ..watch import Progress
from .answerer import Answerer, EngineAnswerer
from .calibration import calibration_scores
from .evaluate import (
    FEW_WORDS,
    SAID_TOKENS,
    Put,
    Results,
    Scorer,
    answers_of,
    as_it_is,
    by_task,
    compare,
    deep,
    flat,
    pair_of,
    probes,
    prompt_of,
)
from .forgetting import general_scores, recall
from .gate import judged
from .similarity import Similar, similar_by

WHO = {"candidate": "the expert", "base": "the base", "live": "the live expert"}
"""What contestants are called where progress is told."""
PER_ROW = ("confidence", "brier")
"""Metrics that calibration is made of; a task's card does not list them."""
HEADINGS = ("task", "metric", "base", "live", "candidate", "95 % interval", "rows")
"""Of the columns of `summary`."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What each contestant ("candidate", "base" and perhaps "live") reached, a value a row.

    `results` are of the held-out rows and the free questions, `general` of the probe for forgetting; `with_context` are of the
    rows that passages were found for, with these: of candidate and base, empty where none were looked up. `left_out` rows did
    not fit the model.
    """

    results: Mapping[str, Results]
    general: Mapping[str, Results]
    with_context: Mapping[str, Results]
    left_out: int = 0

    def scores(self) -> tuple[Score, ...]:
        """For the card: the candidate's, beside the base's and the live expert's."""
        tasks = [one for one in _compared(self.results) if one.metric not in PER_ROW]
        quoted = _compared({who: judged(one) for who, one in self.with_context.items()}) if self.with_context else ()
        quoted = tuple(replace(one, metric=f"{one.metric}_with_context") for one in quoted)
        return (*tasks, *quoted, *general_scores(self.general), *calibration_scores(self.results))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; `of` reads them back."""
        parts = {name: {who: flat(one) for who, one in getattr(self, name).items()} for name in _PARTS}
        return {**parts, "left_out": self.left_out}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        parts = {name: {who: deep(one) for who, one in data[name].items()} for name in _PARTS}
        return cls(**parts, left_out=data["left_out"])


_PARTS = ("results", "general", "with_context")


def measure(
    domain: str,
    held_out: Sequence[Example],
    base: CachedModel,
    adapters: Mapping[str, Path | None],
    settings: Settings,
    progress: Progress,
    *,
    context: Put | None = None,
) -> Measured:
    """Measure the contestants: `adapters` has the PEFT folder of "candidate" and perhaps of "live", and None for "base".

    The engine is opened as the settings have it, so in the precision that serves. `context` makes of a question the same with
    passages quoted before it, as the runtime quotes them, or gives it back where nothing was found.

    Raises ContextTooLong where no row fits the model, and what opening the engine, the encoder and the adapters raises.
    """
    from ...experts.engine.load import open_engine
    from ...models.load import load_tokenizer

    tokenizer = load_tokenizer(base)
    engine = open_engine(base, settings, tokenizer)
    try:
        contest = _Contest(engine, ChatEncoder(tokenizer), adapters, settings, progress)
        return contest.measured(domain, held_out, context)
    finally:
        engine.close()


def summary(measured: Measured) -> list[tuple[str, ...]]:
    """What was measured as rows of texts, under `HEADINGS`."""
    return [
        (
            *(score.task, score.metric, f"{score.base:.3f}"),
            f"{score.beside['live']:.3f}" if "live" in score.beside else "",
            *(f"{score.value:.3f}", f"{score.low:.3f} to {score.high:.3f}", str(score.rows)),
        )
        for score in measured.scores()
    ]


@dataclass(frozen=True, slots=True)
class _Contest:
    engine: Engine
    chat: ChatEncoder
    adapters: Mapping[str, Path | None]
    settings: Settings
    progress: Progress

    def measured(self, domain: str, held_out: Sequence[Example], context: Put | None) -> Measured:
        rows = [row for row in held_out if self._fits(row)]
        if not rows:
            raise ContextTooLong(
                f"None of {len(held_out)} held-out rows fits the model with its answer.",
                hint="Give shorter ones, or raise max_prompt_tokens or kv_cache_mb.",
            )
        asked, similar = [*rows, *probes(domain)], self._similar(rows)
        results = {who: self._score(who, asked, similar=similar, calibrated=True) for who in self.adapters}
        general = {
            who: recall(self._answerer(who), self.chat, partial(self.progress, f"testing what {WHO[who]} remembers"))
            for who in self.adapters
        }
        quoted, put = self._quoted(rows, context) if context else ([], as_it_is)
        who_reads = ("candidate", "base") if quoted else ()
        with_context = {who: self._score(who, quoted, put=put) for who in who_reads}
        return Measured(results, general, with_context, len(held_out) - len(rows))

    def _score(self, who: str, rows: Sequence[Example], *, put: Put = as_it_is, **more: Any) -> Results:
        scorer = Scorer(self._answerer(who), self.chat, put=put, **more)
        reading = "" if put is as_it_is else " with passages"
        return by_task(rows, scorer.score(rows, partial(self.progress, f"measuring {WHO[who]}{reading}")))

    def _answerer(self, who: str) -> Answerer:
        folder = self.adapters[who]
        adapter = Adapter(str(folder), folder) if folder else None
        return EngineAnswerer(self.engine, lambda prompt: (Row(prompt, adapter),))

    def _fits(self, row: Example, put: Put = as_it_is) -> bool:
        """Whether the model can read the row and answer it, in this process as it is set."""
        prompt = len(prompt_of(row, self.chat, put))
        answers = [*answers_of(row, self.chat), *(pair_of(row, self.chat) if row.rejected else ())]
        longest = max(SAID_TOKENS, *map(len, answers))
        return prompt <= self.settings.max_prompt_tokens and prompt + longest <= self.engine.room()

    def _quoted(self, rows: Sequence[Example], context: Put) -> tuple[list[Example], Put]:
        """The rows that passages are found for, and how they are put with these; no passages where they do not fit."""
        texts = {question: context(question) for question in dict.fromkeys(ask(row) for row in rows)}
        put = texts.__getitem__
        return [row for row in rows if texts[ask(row)] != ask(row) and self._fits(row, put)], put

    def _similar(self, rows: Sequence[Example]) -> Similar | None:
        """By the home's encoder, which is opened only if there is an answer to compare."""
        if not any(len(row.answer.split()) > FEW_WORDS and not row.choices for row in rows):
            return None
        from ...models.encoder import Encoder

        models = ModelCache(self.settings.home.expanduser() / "models", timeout=self.settings.fetch_timeout)
        return similar_by(Encoder(models.get(self.settings.encoder, self.progress)).encode)


def _compared(results: Mapping[str, Results]) -> tuple[Score, ...]:
    live = {"live": results["live"]} if "live" in results else None
    return compare(results["candidate"], results["base"], live)
