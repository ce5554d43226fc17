"""The stages of a proxied expert: the small model's adapter, the fit of the combination, and one measurement of each rival."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import ContextTooLong
from ...experts.adapters import store_adapter
from ...experts.engine.request import BASE
from ...experts.engine.slots import Adapter
from ...experts.home import Home
from ...experts.kinds import Host
from ...experts.pool import LocalModel
from ...models.cache import CachedModel
from ...schema import ARTIFACT, Lora, Score, Spec, digest
from ..measuring.evaluate import (
    ANSWER_TOKENS,
    Results,
    Scorer,
    answer_of,
    by_task,
    compare,
    deep,
    flat,
    prompt_of,
    question_of,
)
from ..measuring.gate import Verdicts, judge
from ..pipeline import train_adapter
from ..plan import Plan
from ..recipes import Progress
from ..rows.examples import Example
from ..rows.intake import Taken
from ..stages import Stages
from ..watch import Watch
from .fit_combination import Fitted, fit, fitted_from_dict
from .parts import Parts
from .record_answers import record

DEV_TOKENS = 12_000
"""Tokens of answers from which a combination is fitted; more would hardly change it."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Those that the small model was trained on, those to fit on, and those to measure on."""

    tasks: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A proxied expert that was measured beside `large` and `tuned`, which it is made of, and `direct`, the large model tuned."""

    spec: Callable[[Lora], Spec]
    """From the small model's adapter."""
    results: Results
    large: Results
    tuned: Results
    direct: Results | None = None
    fitted: Fitted | None = None
    capabilities: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> tuple[Score, ...]:
        """For the card: the large model is the base, the others stand beside."""
        beside = {"expert alone": self.tuned} | ({"tuned directly": self.direct} if self.direct else {})
        return compare(self.results, self.large, beside)

    @property
    def verdicts(self) -> Verdicts:
        """Against those that it is made of: where one of them is as good, it is simpler and faster."""
        rivals = {"the large model alone": self.large, "the small expert alone": self.tuned}
        return Verdicts({who: judge(self.results, results) for who, results in rivals.items()})

    @property
    def fit_report(self) -> dict[str, Any]:
        """For the card: what each method lost on the rows of the fit, in nats a token."""
        if self.fitted is None:
            return {}
        return {"fit": {"nll": dict(self.fitted.nll), "answers": self.fitted.answers, "tokens": self.fitted.tokens}}


@dataclass(frozen=True, slots=True)
class ProxyJob:
    """`small` is the model of the pair; what is finished is in `stages`."""

    plan: Plan
    home: Home
    small: CachedModel
    stages: Stages
    progress: Progress

    def adapter(self, given: Path | None, taken: Taken) -> tuple[Lora, dict[str, Any]]:
        """The small model's adapter, in the store, and what its training told; trained where none is given.

        Raises what training and `store_adapter` raise.
        """
        if given:
            return self.store(given, self.small), {"name": "given"}
        settings, watch = self.home.settings, Watch(self.progress)
        folder, report = train_adapter(self.plan, taken, self.small, self.stages, settings, watch)
        return self.store(folder, self.small), report

    def store(self, adapter: Path, model: CachedModel) -> Lora:
        """Measured are the very bytes that will serve. Raises what `store_adapter` raises."""
        with tempfile.TemporaryDirectory() as scratch:
            return store_adapter(adapter, model, self.home.artifacts, Path(scratch) / "adapter")

    def check_room(self, host: Host, models: Sequence[tuple[LocalModel, int]], rows: Sequence[Example]) -> None:
        """`models` with the rows that a request has on each. Raises ContextTooLong where rows do not fit them with an answer."""
        for model, each in models:
            room, chat = host.engine.room(model.name, each), model.chat
            asked = [(row, *question_of(row, chat)) for row in rows]
            long = [
                row.id for row, prompt, answers in asked if len(prompt) + max(ANSWER_TOKENS, *map(len, answers)) > room
            ]
            if long:
                raise ContextTooLong(
                    f"{len(long)} of the rows are too long to be measured with, {long[0]} the first: {room} tokens fit.",
                    hint="Leave them out, or raise kv_cache_mb where the model reads more.",
                )

    def loaded(self, lora: Lora) -> Adapter:
        """An adapter of the store, as the engine takes it."""
        return Adapter(lora.adapter, self.home.artifacts.verify(lora.adapter))

    def fit(self, parts: Parts, dev: Sequence[Example], identity: Sequence[str]) -> Fitted:
        """The combinations, fitted on as many of the rows as it takes. `identity` names the models."""

        def fitting(folder: Path) -> dict[str, Any]:
            questions = [(prompt_of(row, parts.chat), [answer_of(row, parts.chat)]) for row in dev]
            sizes = [len(answers[0]) for _, answers in questions]
            enough = [question for at, question in enumerate(questions) if sum(sizes[:at]) < DEV_TOKENS]
            rows = parts.rows(("large", "tuned", "untuned"), dev)
            return fit(record(parts.host.engine, rows, enough, partial(self.progress, "fitting"))).to_dict()

        _, report = self.stages.run(self._name("fit", [*identity, _digest(dev)]), fitting)
        return fitted_from_dict(report)

    def measure(self, who: str, scorer: Scorer, rows: Sequence[Example], identity: Sequence[str]) -> Results:
        """What somebody reaches on the rows. `identity` names all that decides it."""

        def measuring(folder: Path) -> dict[str, Any]:
            told = partial(self.progress, f"measuring {who}")
            return {"results": flat(by_task(rows, scorer.score(rows, told)))}

        _, report = self.stages.run(self._name(f"measure-{who}", [*identity, scorer.spoken, _digest(rows)]), measuring)
        return deep(report["results"])

    def _name(self, stage: str, what: Sequence[str]) -> str:
        settings = self.home.settings  # of another precision, it is measured again
        return f"{stage.replace(' ', '-')}-{digest([settings.precision, settings.device, *what])[:12]}"


def _digest(rows: Sequence[Example]) -> str:
    return digest([asdict(row) for row in rows])


def identities(models: Mapping[str, CachedModel]) -> dict[str, str]:
    """For a card: of models by the names that it gives them, those whose names do not say it already."""
    named = {name: model for name, model in models.items() if name != BASE and not name.startswith(ARTIFACT)}
    return {name: model.identity for name, model in named.items()}
