"""How fast a recipe trains beside plain TRL: tokens a second on the same rows, base model, LoRA, batch and precision.

    python benchmarks/training.py [--quick] [--rows 320] [--json FILE]

Both train on token rows of banking77, one after the other in each round, on one thread. Time is the processor's: what else the
machine does is not counted. TRL's SFTTrainer runs as it comes, and once more with activation checkpointing off, which spends time
to save memory. Tokens are those of the rows: padding counts for nobody. The first step is left out, since it pays for what is set
up once.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from data import need, parser
from transformers import PrinterCallback, Trainer, TrainerCallback

from collegium.experts.home import Home
from collegium.models.load import limit_threads
from collegium.settings import Settings
from collegium.training.recipes import Row
from collegium.training.rows.examples import read_examples
from collegium.training.tuning.batches import order, padding
from collegium.training.tuning.bench import Bench
from collegium.training.tuning.tuning import ROWS_AT_ONCE, Tuning, adapt, course, trainer_of
from collegium.training.watch import Watch

Make = Callable[[Bench, Sequence[Row], Tuning, Path], Trainer]


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self._began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.steps.append(time.process_time() - self._began)


def ours(bench: Bench, rows: Sequence[Row], options: Tuning, folder: Path) -> Trainer:
    way = course(options, len(rows))
    return trainer_of(adapt(bench.load(), options), rows, folder, options, way, end=bench.end)


def plain(bench: Bench, rows: Sequence[Row], options: Tuning, folder: Path, **changes: Any) -> Trainer:
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    way = course(options, len(rows))
    masks = [[0] * len(row.prompt) + [1] * len(row.answer) for row in rows]
    dataset = [
        {"input_ids": [*row.prompt, *row.answer], "completion_mask": mask}
        for row, mask in zip(rows, masks, strict=True)
    ]
    trainer: Trainer = SFTTrainer(
        model=bench.load(),
        processing_class=bench.tokenizer,
        train_dataset=Dataset.from_list(dataset),
        peft_config=LoraConfig(
            r=options.rank, lora_alpha=options.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=way.at_once,
            gradient_accumulation_steps=way.accumulated,
            num_train_epochs=1,
            learning_rate=options.learning_rate,
            completion_only_loss=True,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **changes,
        ),
    )
    return trainer


def unchecked(bench: Bench, rows: Sequence[Row], options: Tuning, folder: Path) -> Trainer:
    return plain(bench, rows, options, folder, activation_checkpointing=False)


WAYS: dict[str, Make] = {"collegium": ours, "plain TRL": plain, "plain TRL, no checkpointing": unchecked}


def tokens_per_second(make: Make, bench: Bench, rows: Sequence[Row], options: Tuning) -> float:
    """Of all steps but the first, as if each had the mean number of tokens."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = make(bench, rows, options, Path(folder)), Clock()
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    each = sum(len(row) for row in rows) / len(clock.steps)
    return each * len(clock.steps[1:]) / sum(clock.steps[1:])


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--rows", type=int, default=320, help="rows that are trained on in each round")
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    if given.quick:
        given.rows, given.rounds = 64, 1
    limit_threads(1)
    torch.manual_seed(17)
    with Home(Settings.load(device="cpu")) as home:
        base = home.models.get(home.settings.base_model)
        bench = Bench(base, home.settings, Path(), Watch(lambda stage, done, of: None))
        file = need(given.data) / "experts" / "finance" / "banking77.train.jsonl.gz"
        rows, tuning = bench.rows(read_examples([file], limit=given.rows)), Tuning(epochs=1.0)
        found: dict[str, list[float]] = {name: [] for name in WAYS}
        for at in range(given.rounds):
            for name, make in WAYS.items():
                found[name].append(tokens_per_second(make, bench, rows, tuning))
                print(f"round {at + 1}, {name}: {found[name][-1]:.0f} tokens/s", flush=True)
    show(rows, tuning, found, given.json)


def show(rows: Sequence[Row], tuning: Tuning, found: dict[str, list[float]], file: Path | None) -> None:
    """Print the medians and ratios, and write them where a file is given."""
    speed = {name: median(values) for name, values in found.items()}
    lengths, way = [len(row) for row in rows], course(tuning, len(rows))
    ordered = [lengths[at] for at in order(lengths, way.steps, way.batch, tuning.seed)]
    figures = {
        "rows": len(rows),
        "tokens": sum(lengths),
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "tokens_per_second_ratio": round(speed["collegium"] / speed["plain TRL"], 2),
        "ratio_without_checkpointing": round(speed["collegium"] / speed["plain TRL, no checkpointing"], 2),
        "padding": round(padding(ordered, ROWS_AT_ONCE), 3),
        "padding_as_they_come": round(padding(lengths, ROWS_AT_ONCE), 3),
    }
    print(json.dumps(figures, indent=1))
    if file:
        file.write_text(json.dumps(figures, indent=1), "utf-8")


if __name__ == "__main__":
    main()
