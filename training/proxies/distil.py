"""Teach a small model to expect what a large one expects: distillation on text, into a LoRA adapter on the small one.

The loss is the divergence KL(teacher || student) of the two distributions over the whole vocabulary, at every position of the
text (Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015; temperature 1). To prune and then to distil is the
recipe of Muralidharan et al., *Compact Language Models via Pruning and Knowledge Distillation*, 2024. transformers trains and
keeps checkpoints, PEFT adapts.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..recipes import Progress
from ..tuning.batches import order
from ..tuning.checkpoints import COMPLETE, complete, last_checkpoint

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

Tokens = Sequence[int]

TEXTS_AT_ONCE = 8
"""Texts whose activations are in memory together, at most; larger batches are accumulated."""
POSITIONS_AT_ONCE = 64
"""Positions whose distributions over the vocabulary are in memory together."""
SAVE_STEPS, KEPT_CHECKPOINTS = 20, 2
"""A checkpoint each so many steps; the one before stays until the next is on the disk."""


@dataclass(frozen=True, slots=True)
class Distilling:
    """How a small model is taught. Texts are cut at `max_tokens`; a batch is so many texts, a step is one batch."""

    steps: int = 600
    rank: int = 32
    learning_rate: float = 1e-3
    batch: int = 8
    max_tokens: int = 256
    seed: int = 17


def distil(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    texts: Sequence[Tokens],
    checkpoints: Path,
    options: Distilling,
    progress: Progress,
) -> tuple[Any, dict[str, Any]]:
    """The student with an adapter (a PeftModel), and what it took: tokens, seconds, losses.

    Goes on from the last of `checkpoints`; what follows is what would have followed without the interruption.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(options.seed)  # the adapter begins with random numbers
    adapter = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(student, adapter)
    ordered = order([len(text) for text in texts], options.steps, options.batch, options.seed)
    last, started = last_checkpoint(checkpoints), time.monotonic()
    if last:
        started -= float(json.loads((last / COMPLETE).read_text("utf-8"))["seconds"])
    trainer = _trainer(
        teacher,
        model=model,
        train_dataset=[{"input_ids": texts[at]} for at in ordered],
        data_collator=_pad,
        args=_arguments(options, checkpoints, on_cpu=student.device.type == "cpu"),
        callbacks=[_report_to(progress, checkpoints, started)],
    )
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return model.eval(), {
        "tokens": sum(len(texts[at]) for at in ordered),
        "seconds": round(time.monotonic() - started, 1),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def _arguments(options: Distilling, checkpoints: Path, *, on_cpu: bool) -> TrainingArguments:
    from transformers import TrainingArguments

    at_once = math.gcd(options.batch, TEXTS_AT_ONCE)
    return TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=options.batch // at_once,
        num_train_epochs=1,
        train_sampling_strategy="sequential",  # as `order` has them
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        use_cpu=on_cpu,
        remove_unused_columns=False,
        logging_steps=10,
        save_steps=SAVE_STEPS,
        save_total_limit=KEPT_CHECKPOINTS,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
        seed=options.seed,
    )


def divergence(teacher: Tensor, student: Tensor, heads: tuple[Tensor, Tensor]) -> Tensor:
    """Mean KL of the distributions that the last states [n, d] of both and their `heads` [vocabulary, d] make, in nats.

    Its gradient by the student's states is known, (q - p) W, so it is computed here, a few positions at a time: the
    distributions of a whole batch would take gigabytes (as Hsu et al., *Liger Kernel*, 2024, do it).
    """
    import torch

    total, slopes = 0.0, []
    with torch.no_grad():
        for at in range(0, len(student), POSITIONS_AT_ONCE):
            taught, state = (states[at : at + POSITIONS_AT_ONCE] for states in (teacher, student))
            log_p = (taught.to(heads[0].dtype) @ heads[0].T).float().log_softmax(-1)
            log_q = (state.to(heads[1].dtype) @ heads[1].T).float().log_softmax(-1)
            p = log_p.exp()
            total += float((p * log_p.sub_(log_q)).sum())
            slopes.append(log_q.exp_().sub_(p).to(heads[1].dtype) @ heads[1])
    slope = torch.cat(slopes).float() / len(student)
    linear = (student.float() * slope).sum()
    return linear + (total / len(student) - linear).detach()


def measure(teacher: PreTrainedModel, taught: Any, texts: Sequence[Tokens], progress: Progress) -> dict[str, float]:
    """What healing brought, in nats a token on `texts`.

    `cut_kl` and `healed_kl` are the divergence of the teacher's expectations from the student's without and with its adapter,
    `base_nll`, `cut_nll` and `healed_nll` the negative log-likelihood of the texts under the teacher and under these two.
    """
    import torch

    sums: dict[str, float] = defaultdict(float)
    with torch.inference_mode():
        for done, text in enumerate(texts, 1):
            ids = torch.tensor([text], device=teacher.device)
            expected = _log_probabilities(teacher, ids)
            sums["base_nll"] += _nll(expected, ids)
            for name, disabled in (("cut", taught.disable_adapter()), ("healed", nullcontext())):
                with disabled:
                    found = _log_probabilities(taught, ids)
                sums[f"{name}_nll"] += _nll(found, ids)
                sums[f"{name}_kl"] += float((expected.exp() * (expected - found)).sum(-1)[:-1].sum())
            progress("measuring", done, len(texts))
    tokens = sum(len(text) - 1 for text in texts)
    return {name: round(value / tokens, 4) for name, value in sorted(sums.items())}


def _trainer(teacher: Any, **arguments: Any) -> Any:
    import torch
    from transformers import PrinterCallback, Trainer

    class Distiller(Trainer):
        def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
            # Padding is on the right: attention is causal, so no text sees it, and no mask is paid for.
            ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
            cut = model.get_base_model()
            with torch.autocast(ids.device.type, torch.bfloat16):
                with torch.no_grad():
                    taught = teacher.get_decoder()(ids, use_cache=False).last_hidden_state[real]
                states = cut.get_decoder()(ids, use_cache=False).last_hidden_state[real]
            heads = [one.get_output_embeddings().weight for one in (teacher, cut)]
            return divergence(taught, states, (heads[0], heads[1]))

    trainer = Distiller(**arguments)
    trainer.remove_callback(PrinterCallback)  # standard output is the command's
    return trainer


def _pad(rows: Sequence[dict[str, Tokens]]) -> dict[str, Tensor]:
    import torch

    texts = [torch.tensor(row["input_ids"]) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    real = torch.arange(ids.shape[1])[None] < torch.tensor([len(text) for text in texts])[:, None]
    return {"input_ids": ids, "attention_mask": real.long()}


def _report_to(progress: Progress, checkpoints: Path, started: float) -> TrainerCallback:
    from transformers import TrainerCallback, TrainerControl, TrainerState

    class Report(TrainerCallback):
        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
        ) -> None:
            progress("distilling", state.global_step, state.max_steps)

        def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
            complete(checkpoints / f"checkpoint-{state.global_step}", seconds=time.monotonic() - started)

    return Report()


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    return logits.log_softmax(-1)


def _nll(log_probabilities: Tensor, ids: Tensor) -> float:
    return -float(log_probabilities[:-1].gather(1, ids[0, 1:, None]).sum())
