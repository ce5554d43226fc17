"""Preference pairs: make the better answer likelier than the worse one, without going far from where the model stood.

*Direct Preference Optimization: Your Language Model is Secretly a Reward Model* (Rafailov et al., 2023): with the preferred
answer w and the rejected one l to the prompt x, and the model p_0 that training begins with,

    loss = -log sigmoid(beta (log p(w|x) / p_0(w|x) - log p(l|x) / p_0(l|x))).

p_0 is the base model, or with `first` the model that the preferred answers were learned by before: the adapter that training
begins with is held beside the one that is trained. TRL computes the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InvalidRequest
from ..rows.examples import Example
from ..tuning.batches import order
from ..tuning.bench import Bench
from ..tuning.estimate import plan_course
from ..tuning.tuning import LEARNING_RATE, adapt, arguments
from . import Material, Recipe, Row, lora_sft

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass(frozen=True, slots=True)
class Options(lora_sft.Options):
    """`beta` holds the model near where it stood; `first` learns the preferred answers before, at `first_rate`."""

    learning_rate: float = 1e-4
    beta: float = 0.1
    first: bool = True
    first_rate: float = LEARNING_RATE


def train(bench: Bench, material: Material, options: Options) -> dict[str, Any]:
    """Learn to prefer one answer to another: needs preference pairs."""
    start, told = None, {}
    if options.first:
        learning = replace(options, learning_rate=options.first_rate)
        start, before = bench.tune(lora_sft.rows(bench, material, learning), learning, name="first")
        told = {"first": {name: before[name] for name in ("rows", "tokens", "seconds", "losses")}}
    return {**prefer(bench, [row for row in material.tasks if row.rejected], options, start), **told}


def prefer(bench: Bench, examples: Sequence[Example], options: Options, start: Path | None) -> dict[str, Any]:
    """Optimise on the pairs, from the adapter in `start` where there is one."""
    better, worse = bench.rows(examples), bench.rows([replace(row, answer=row.rejected) for row in examples])
    both = [pair for pair in zip(better, worse, strict=True) if max(map(len, pair)) <= options.max_length]
    if not both:
        raise InvalidRequest(
            f"None of the {len(examples)} pairs fits {options.max_length} tokens.", hint="Raise max_length."
        )
    # A pair takes the room of its two rows.
    pairs = [Row((*one.prompt, *one.answer, *other.prompt), other.answer) for one, other in both]

    def trainer(checkpoints: Path) -> Trainer:
        way = plan_course(bench.base, pairs, options, bench.settings)
        ordered = order([len(pair) for pair in pairs], way.steps, way.batch, options.seed)
        model = adapt(bench.load(), options, start)
        chosen = arguments(options, checkpoints, way, model.device.type)
        return pair_trainer(bench, model, [both[at] for at in ordered], chosen, options)

    told = bench.fit(trainer)[1]
    counted = {"rows": len(pairs), "too_long": len(examples) - len(pairs), "tokens": sum(len(pair) for pair in pairs)}
    return {**asdict(options), "epochs": options.passes(len(pairs)), **counted, **told}


def pair_trainer(
    bench: Bench, model: Any, pairs: Sequence[tuple[Row, Row]], chosen: dict[str, Any], options: Options
) -> Trainer:
    """TRL's trainer on pairs of token rows, in their order."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Pairs(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *rest: Any) -> Dataset:
            return dataset  # tokens already, by the encoder that no message can forge a role with

    held = {"beta": options.beta, "max_length": None, "activation_checkpointing": False}
    trainer: Trainer = Pairs(
        model=model,
        args=DPOConfig(**{**chosen, **held}),
        processing_class=bench.tokenizer,
        train_dataset=Dataset.from_list(
            [
                {"prompt_ids": [*one.prompt], "chosen_ids": [*one.answer], "rejected_ids": [*other.answer]}
                for one, other in pairs
            ]
        ),
    )
    return trainer


RECIPE = Recipe(Options, train, needs=("preferences",))
