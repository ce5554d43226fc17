"""Supervised tuning of a LoRA adapter on the answers.

W x becomes W x + (alpha / r) B A x with A [r, in] and B [out, r] (Hu et al., *LoRA*, 2021), on every linear layer but the
head; the loss is the mean negative log-likelihood of the answers' tokens. TRL trains, PEFT adapts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InvalidRequest
from ..adapter_folder import save_adapter
from . import Progress, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback


ROWS_AT_ONCE = 8
"""Rows whose activations are in memory together; larger batches are accumulated."""


@dataclass(frozen=True, slots=True)
class Options:
    """What may be chosen, with defaults that hold from some hundred to some ten thousand rows."""

    rank: int = 8
    alpha: int = 16
    learning_rate: float = 1e-3
    epochs: float = 1.0
    batch_size: int = 16
    max_length: int = 512
    seed: int = 17


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    folder: Path,
    *,
    options: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Train and write the PEFT folder in bfloat16. Rows longer than `max_length` are left out and counted."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    chosen = _options(options)
    fitting = [row for row in rows if len(row.prompt) + len(row.answer) <= chosen.max_length]
    if not fitting:
        raise InvalidRequest(f"None of the {len(rows)} rows fits {chosen.max_length} tokens.", hint="Raise max_length.")
    dataset = Dataset.from_list(
        [
            {
                "input_ids": [*row.prompt, *row.answer],
                "completion_mask": [0] * len(row.prompt) + [1] * len(row.answer),
            }
            for row in fitting
        ]
    )
    at_once = min(chosen.batch_size, ROWS_AT_ONCE)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=dataset,
        peft_config=LoraConfig(
            r=chosen.rank, lora_alpha=chosen.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        args=SFTConfig(
            output_dir=str(folder.parent / "trainer"),
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=-(-chosen.batch_size // at_once),
            learning_rate=chosen.learning_rate,
            num_train_epochs=chosen.epochs,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            bf16=True,
            use_cpu=model.device.type == "cpu",
            activation_checkpointing=False,
            completion_only_loss=True,
            max_length=chosen.max_length,
            train_sampling_strategy="group_by_length",  # rows of like length share a batch, so little padding is paid for
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=model.device.type != "cpu",
            seed=chosen.seed,
        ),
        callbacks=[_report_to(progress)],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is the command's
    result = trainer.train()
    save_adapter(trainer.model, folder)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        **asdict(chosen),
        "rows": len(fitting),
        "too_long": len(rows) - len(fitting),
        "tokens": sum(len(row.prompt) + len(row.answer) for row in fitting),
        "seconds": round(result.metrics["train_runtime"], 1),
        "losses": losses,
    }


def _options(given: dict[str, Any]) -> Options:
    known = {field.name for field in fields(Options)}
    if unknown := set(given) - known:
        raise InvalidRequest(
            f"lora-sft has no option {', '.join(sorted(unknown))}.", hint=f"Known: {', '.join(sorted(known))}."
        )
    options = Options(**given)
    for field in fields(Options):
        value, kind = getattr(options, field.name), type(field.default)
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not fits or isinstance(value, bool) or value < 0 or (kind is int and field.name != "seed" and value < 1):
            raise InvalidRequest(
                f"lora-sft needs {field.name} to be a positive {kind.__name__}, not {value!r}.",
                hint=f"Default: {field.default}.",
            )
    return options


def _report_to(progress: Progress) -> TrainerCallback:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    class Report(TrainerCallback):
        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
        ) -> None:
            progress("training", state.global_step, state.max_steps)

    return Report()
