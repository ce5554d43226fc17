"""What a training takes, before it is begun: seconds by timing two layers on this machine, bytes by a formula.

The formula counts what a step keeps for its way back. Of each token in memory that is, for one of L layers of width d, with f
between and h heads, over rows of t tokens:

    66 d + 13 f + 4.3 h t bytes, three layers more than there are for what lives for a moment,

and 11 bytes for each of the vocabulary's logits in a column that the head is computed for. The numbers were fitted to the peak of
a process on a CPU over five shapes and rows of 64 to 512 tokens, and met it within 5 %, 13 % in the worst case.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InvalidRequest
from ...experts.engine.shape import Shape, read_shape
from ...models.cache import CachedModel
from ...models.load import pick_device
from ...settings import Settings
from .batches import Collator, answer_loss, order, padding
from .tuning import ROWS_AT_ONCE, Course, Tuning, adapt, course

if TYPE_CHECKING:
    import torch

    from ..recipes import Row

WIDTH_BYTES, BETWEEN_BYTES, PAIR_BYTES, LOGIT_BYTES = 66, 13, 4.3, 11
MOMENTARY_LAYERS = 3
PROCESS_BYTES = 450 << 20
"""Of Python and the packages, and what torch keeps for itself."""
WEIGHT_BYTES, TRAINED_BYTES = 2, 16
"""Of a weight in bfloat16; of a trained one in float32 with its gradient and AdamW's two moments."""
SPARED = 0.9
"""Share of the free memory that a training may take where no bound is set."""
SHORT = 90
"""Seconds that are told as such, and minutes."""
TIMED_LAYERS = (1, 3)
TIMES = 2
TIMED_TOKENS = 256
"""More than so many in a batch are timed as fewer rows."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a training takes: `tokens` are those of all steps without padding, `bytes` the process's peak."""

    seconds: float
    bytes: int
    tokens: int
    steps: int

    def __str__(self) -> str:
        """In words, for the person who waits."""
        return (
            f"{_duration(self.seconds)} and {self.bytes / 1e9:.1f} GB for {self.tokens:,} tokens in {self.steps} steps"
        )


def estimate(base: CachedModel, rows: Sequence[Row], options: Tuning, settings: Settings) -> Estimate:
    """What `Bench.tune` takes on these rows. It works for a second, with torch's threads as they are.

    Raises what `plan_course` raises.
    """
    way = plan_course(base, rows, options, settings)
    lengths = [len(row) for row in rows]
    ordered = [lengths[at] for at in order(lengths, way.steps, way.batch, options.seed)]
    tokens = sum(ordered)
    columns = tokens / (1 - padding(ordered, way.at_once))
    batches = way.steps * way.accumulated * way.processes
    kept = sum(len(row.answer) for row in rows) // len(rows) + 1
    seconds = _timed(base, options, settings, way.at_once, round(columns / batches / way.at_once), kept)
    longest = max(rows, key=len)
    need = needed_bytes(base.folder, options, way.at_once, len(longest), len(longest.answer))
    return Estimate(batches / way.processes * seconds, need, tokens, way.steps)


def plan_course(base: CachedModel, rows: Sequence[Row], options: Tuning, settings: Settings) -> Course:
    """The course of a training, with as many rows in memory at once as there is room for.

    Raises InvalidRequest where not even one of the longest has room.
    """
    room, longest = free_bytes(settings), max(rows, key=len)
    kept = max(len(row.answer) for row in rows)
    need, most = 0, ROWS_AT_ONCE
    while most:
        need = needed_bytes(base.folder, options, most, len(longest), kept)
        if need <= room:
            return course(options, len(rows), most)
        most //= 2  # so a step keeps its rows
    raise InvalidRequest(
        f"Training on a row of {len(longest)} tokens takes {need / 1e9:.1f} GB, and {room / 1e9:.1f} GB are free for it.",
        hint="Lower max_length, raise training_memory_mb where it is set, or take a smaller base model.",
    )


def needed_bytes(folder: Path, options: Tuning, at_once: int, width: int, kept: int) -> int:
    """The process's peak with so many rows of `width` tokens in memory, `kept` columns of which the head is computed for."""
    shape = read_shape(folder)
    token = WIDTH_BYTES * shape.hidden + BETWEEN_BYTES * shape.intermediate + PAIR_BYTES * shape.heads * width
    activations = at_once * width * (shape.layers + MOMENTARY_LAYERS) * token
    logits = at_once * kept * shape.vocab * LOGIT_BYTES
    trained = options.rank * shape.layers * sum(out + into for out, into in shape.linears.values()) * TRAINED_BYTES
    return round(PROCESS_BYTES + weights(shape) * WEIGHT_BYTES + trained + activations + logits)


def weights(shape: Shape) -> int:
    """How many weights a model of a shape has, but for the norms."""
    layer = sum(out * into for out, into in shape.linears.values())
    return layer * shape.layers + shape.vocab * shape.hidden * (1 if shape.tied else 2)


def free_bytes(settings: Settings) -> float:
    """What a training may take: the bound that is set, else most of what is free on the device."""
    if settings.training_memory_mb:
        return settings.training_memory_mb * 1e6
    if pick_device(settings.device).type == "cuda":
        import torch

        return SPARED * float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:  # no Linux: nobody tells without a package for it
        return float("inf")
    return SPARED * 1024 * next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 1 << 60)


def _timed(base: CachedModel, options: Tuning, settings: Settings, rows: int, width: int, kept: int) -> float:
    """Seconds for one batch, there and back: those of one layer and of three tell what a layer takes, and what the rest."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = pick_device(settings.device)
    build: Any = AutoModelForCausalLM  # from_config has no types
    row, few = {"input_ids": [1] * width, "labels": [1] * min(kept, width)}, max(1, min(rows, TIMED_TOKENS // width))
    batch = {name: tensor.to(device) for name, tensor in Collator(0)([row] * few).items()}
    taken: list[float] = []
    config: Any = AutoConfig.from_pretrained(base.folder)
    layers = int(config.num_hidden_layers)
    for config.num_hidden_layers in TIMED_LAYERS:
        with torch.device("meta"):
            empty = build.from_config(config, dtype=torch.bfloat16)
        model: Any = empty.to_empty(device=device)  # no random numbers: the time does not depend on the weights
        for weight in (*model.parameters(), *model.buffers()):
            weight.data.zero_()
        model = adapt(model, options).train()
        taken.append(min(_step(model, batch, device) for _ in range(TIMES)))
    one, three = taken
    layer = max(three - one, 0.0) / (TIMED_LAYERS[1] - TIMED_LAYERS[0])
    return (one + layer * (layers - TIMED_LAYERS[0])) * rows / few


def _step(model: Any, batch: dict[str, torch.Tensor], device: torch.device) -> float:
    import torch

    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16):
        loss: Any = answer_loss(model(**inputs), batch["labels"])
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _duration(seconds: float) -> str:
    if seconds < SHORT:
        return f"about {max(round(seconds), 1)} seconds"
    minutes = seconds / 60
    return f"about {round(minutes)} minutes" if minutes < SHORT else f"about {minutes / 60:.1f} hours"
