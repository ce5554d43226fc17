"""Low-rank adaptation: what the recipes share. transformers' Trainer optimises, PEFT adapts.

W x becomes W x + (alpha / r) B A x with A [r, in] and B [out, r] (Hu et al., *LoRA*, 2021), on every linear layer but the
head; the loss is the mean negative log-likelihood of the rows' learned tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InvalidRequest
from ..watch import Watch
from .adapter_folder import save_adapter
from .batches import Collator, answer_loss, features, order
from .checkpoints import complete, last_checkpoint

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer, TrainerCallback

    from ..recipes import Row

LEARNING_RATE = 3e-3
"""Of supervised tuning, at rank 8: the best of those tried on rows of BANKING77 that were set aside."""
ROWS_AT_ONCE = 8
"""Rows whose activations are in memory together; larger batches are accumulated, and less memory takes fewer rows."""
EPOCHS = ((500, 4.0), (2000, 2.0))
"""Where the options leave the passes open: fewer rows than the first number get so many; more than the last get one."""
WARM_UP = 0.03
"""Share of the steps in which the learning rate rises."""
LOGGED_STEPS = 10
"""Steps whose mean loss is told."""
CHECKPOINTS, FEWEST_STEPS = 10, 20
"""Checkpoints of a training, from which it goes on where it was stopped; none is nearer to the last than so many steps."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """What every recipe lets choose. The defaults hold from some hundred to some ten thousand rows.

    `epochs` 0 takes them by the number of rows; `max_length` is in tokens, `batch_size` in rows.
    """

    rank: int = 8
    alpha: int = 16
    learning_rate: float = LEARNING_RATE
    epochs: float = 0.0
    batch_size: int = 16
    max_length: int = 512
    seed: int = 17

    def passes(self, rows: int) -> float:
        """Passes over so many rows."""
        return self.epochs or next((passes for below, passes in EPOCHS if rows < below), 1.0)


@dataclass(frozen=True, slots=True)
class Course:
    """How a training goes: so many steps, each of so many batches of `at_once` rows in each process, one after the other."""

    steps: int
    at_once: int
    accumulated: int
    processes: int = 1

    @property
    def batch(self) -> int:
        """Rows of a step."""
        return self.at_once * self.accumulated * self.processes


def course(options: Tuning, rows: int, most: int = ROWS_AT_ONCE) -> Course:
    """The course over so many rows, at most `most` of them in the memory of a process.

    A batch is rounded up to whole shares, and is no larger than the rows.
    """
    batch, processes = min(options.batch_size, rows), int(os.environ.get("WORLD_SIZE", "1"))
    accumulated = -(-batch // (most * processes))
    at_once = -(-batch // (accumulated * processes))
    steps = math.ceil(rows * options.passes(rows) / (at_once * accumulated * processes))
    return Course(steps, at_once, accumulated, processes)


def fitting(rows: Sequence[Row], options: Tuning) -> list[Row]:
    """The rows that are no longer than `max_length`. Raises InvalidRequest where none is left."""
    fit = [row for row in rows if len(row) <= options.max_length]
    if not fit:
        raise InvalidRequest(
            f"None of the {len(rows)} rows fits {options.max_length} tokens.", hint="Raise max_length."
        )
    return fit


def trainer_of(
    model: PeftModel, rows: Sequence[Row], checkpoints: Path, options: Tuning, way: Course, *, end: int
) -> Trainer:
    """The trainer of transformers on token rows, which all fit; padding is the token `end`, which no row sees."""
    from transformers import Trainer, TrainingArguments

    ordered = order([len(row) for row in rows], way.steps, way.batch, options.seed)
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments(options, checkpoints, way, model.device.type)),
        train_dataset=[features(rows[at]) for at in ordered],
        data_collator=Collator(end),
        compute_loss_func=answer_loss,
    )


def adapt(model: PreTrainedModel, options: Tuning, start: Path | None = None) -> PeftModel:
    """The model with an adapter to train: a new one, or the one in the PEFT folder `start`."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(options.seed)
    if model.device.type == "cpu":
        # On a CPU torch's fused attention is slower than the products one by one, backwards above all.
        model.set_attn_implementation("eager")
    model.config.use_cache = False
    if start is not None:
        return PeftModel.from_pretrained(model, str(start), is_trainable=True)
    config = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: PeftModel = get_peft_model(model, config)
    return adapted


def arguments(options: Tuning, checkpoints: Path, way: Course, device: str) -> dict[str, Any]:
    """How transformers' trainers train on the rows of `order`; `device` is a type of torch's."""
    return {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": way.at_once,
        "gradient_accumulation_steps": way.accumulated,
        "learning_rate": options.learning_rate,
        "num_train_epochs": 1,  # of the rows of all steps
        "lr_scheduler_type": "cosine",
        "warmup_steps": int(WARM_UP * way.steps),  # a first step of length nothing would be the only one of a few rows
        "bf16": True,
        "use_cpu": device == "cpu",
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "logging_steps": LOGGED_STEPS,
        "save_strategy": "steps",
        "save_steps": max(FEWEST_STEPS, math.ceil(way.steps / CHECKPOINTS)),
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": device != "cpu",
        "seed": options.seed,
    }


def run(trainer: Trainer, folder: Path, watch: Watch) -> dict[str, Any]:
    """Train, and write the PEFT folder in bfloat16, which the first process alone does; returns seconds and losses.

    Goes on from the trainer's last checkpoint; what follows is what would have followed without the interruption.
    """
    from transformers import PrinterCallback

    checkpoints = Path(str(trainer.args.output_dir))
    trainer.remove_callback(PrinterCallback)  # standard output is the command's
    trainer.add_callback(_report_to(watch, checkpoints))
    with trainer.args.main_process_first():
        last = last_checkpoint(checkpoints)
    result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.is_world_process_zero():
        model: Any = trainer.model  # a PeftModel, which the trainer does not know
        for beside in set(model.peft_config) - {"default"}:
            model.delete_adapter(beside)  # what TRL compares with
        save_adapter(model, folder)
    return {
        "steps": trainer.state.global_step,
        "seconds": round(result.metrics["train_runtime"], 1),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def _report_to(watch: Watch, checkpoints: Path) -> TrainerCallback:
    """A callback that tells each step and each loss, and marks the checkpoints that are whole."""
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    class Report(TrainerCallback):
        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
        ) -> None:
            watch.progress("training", state.global_step, state.max_steps)

        def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
            if "loss" in (told := state.log_history[-1]):
                watch.loss(state.global_step, told["loss"])

        def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
            if state.is_world_process_zero:
                complete(checkpoints / f"checkpoint-{state.global_step}")

    return Report()
