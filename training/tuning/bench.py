"""What a recipe works with: the base model, rows of tokens, the model's own answers, and a training that survives its end.

What is costly is a stage of the job's folder, so it is not done twice. Where several processes train together (`accelerate
launch`), the first one does what is no training, and the others wait for what it leaves.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...models.cache import CachedModel
from ...models.chat import ChatEncoder
from ...models.load import load_lm, load_tokenizer, pick_device
from ...schema import Message, digest
from ...settings import Settings
from ..measuring.scoring import generate
from ..recipes import Row
from ..rows.examples import Example
from ..stages import Stages
from ..watch import Watch
from . import prepare
from .estimate import estimate, plan_course
from .tuning import Tuning, adapt, fitting, run, trainer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

WAIT = 0.2
"""Seconds between two looks at whether the first process has finished a stage."""
GENERATED = 64
"""Questions whose answers are told of together."""
ANSWER_TOKENS = 64
"""Longest answer that the base model is asked for, where a recipe does not say."""


@dataclass(frozen=True)
class Bench:
    """`folder` is the job's: the adapter is left in its `adapter`, checkpoints lie in its `checkpoints` meanwhile."""

    base: CachedModel
    settings: Settings
    folder: Path
    watch: Watch
    seed: int = 17

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The base model's."""
        return load_tokenizer(self.base)

    @cached_property
    def chat(self) -> ChatEncoder:
        """Encodes conversations with the base model's template."""
        return ChatEncoder(self.tokenizer)

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    def load(self) -> PreTrainedModel:
        """The base model in bfloat16, on the device that the settings choose."""
        import torch

        return load_lm(self.base, device=pick_device(self.settings.device), dtype=torch.bfloat16)

    def rows(self, examples: Sequence[Example], *, instructions: bool = False) -> list[Row]:
        """A row for each example, in a wording drawn for it; with `instructions` the question's tokens are learned too."""
        return prepare.token_rows(examples, self.chat, self.end, self.seed, instructions=instructions)

    def blocks(self, texts: Sequence[str], width: int) -> list[Row]:
        """The texts as rows of `width` tokens, all of which are learned; an end token stands behind each text."""
        return prepare.blocks(texts, self.chat, self.end, width)

    def rehearsed(self, domain: str) -> list[Row]:
        """The base model's own answers to free questions, general ones and the domain's."""

        def rehearsal(folder: Path) -> dict[str, Any]:
            self.watch.progress("rehearsing", 0, 0)
            return {
                "rows": [[row.prompt, row.answer] for row in prepare.rehearse(self.load(), self.chat, self.end, domain)]
            }

        _, report = self.once("rehearse", rehearsal)
        return [Row(tuple(prompt), tuple(answer)) for prompt, answer in report["rows"]]

    def answers(self, prompts: Sequence[str], *, max_tokens: int = ANSWER_TOKENS) -> list[str]:
        """The base model's greedy answers, in the order of `prompts`."""

        def answering(folder: Path) -> dict[str, Any]:
            encoded = [self.chat.encode([Message("user", prompt)]) for prompt in prompts]
            model, told = self.load(), list[list[int]]()
            for at in range(0, len(encoded), GENERATED):
                part = encoded[at : at + GENERATED]
                told += generate(model, part, max_tokens=max_tokens, end=self.end)
                self.watch.progress("asking the base model", len(told), len(encoded))
            return {"answers": [self.chat.decode(answer) for answer in told]}

        asked = digest([list(prompts), max_tokens])[:12]
        return [str(answer) for answer in self.once(f"answers-{asked}", answering)[1]["answers"]]

    def tune(
        self, rows: Sequence[Row], options: Tuning, *, start: Path | None = None, name: str = "adapter"
    ) -> tuple[Path, dict[str, Any]]:
        """Train an adapter on `rows`, from zero or from the PEFT folder `start`; returns its folder, `name`, and the report.

        Rows longer than `max_length` are left out and counted. Each training of a recipe needs a name of its own. Raises
        InvalidRequest where no row is left, or not even one has room in memory.
        """
        fit = fitting(rows, options)

        def trainer(checkpoints: Path) -> Trainer:
            way = plan_course(self.base, fit, options, self.settings)
            self.watch.progress(f"training takes {estimate(self.base, fit, options, self.settings)}", 0, 0)
            return trainer_of(adapt(self.load(), options, start), fit, checkpoints, options, way, end=self.end)

        folder, told = self.fit(trainer, name)
        counted = {"rows": len(fit), "too_long": len(rows) - len(fit), "tokens": sum(len(row) for row in fit)}
        return folder, {**asdict(options), "epochs": options.passes(len(fit)), **counted, **told}

    def fit(self, make: Callable[[Path], Trainer], name: str = "adapter") -> tuple[Path, dict[str, Any]]:
        """Train with the trainer that `make` makes for a folder of checkpoints; the adapter's folder `name`, and the report.

        A training that was stopped goes on from its last checkpoint, one that is finished is not done again.
        """
        checkpoints = self.folder / "checkpoints" / name

        def training(folder: Path) -> dict[str, Any]:
            return run(make(checkpoints), folder, self.watch)

        if self._leads or (self.folder / name).exists():
            done = Stages(self.folder).run(name, training)
            shutil.rmtree(checkpoints, ignore_errors=True)
            return done
        with TemporaryDirectory() as nowhere:
            training(Path(nowhere))
        return self.once(name, training)

    def once(self, name: str, work: Callable[[Path], dict[str, Any] | None]) -> tuple[Path, dict[str, Any]]:
        """The folder and the report of a stage of the job, which is done by one process, once: `work` fills its folder."""
        while not (self._leads or (self.folder / name).exists()):
            time.sleep(WAIT)
        return Stages(self.folder).run(name, work)

    @property
    def _leads(self) -> bool:
        return os.environ.get("RANK", "0") == "0"
