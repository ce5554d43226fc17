"""Token rows as batches, and their loss: the head is computed only where a token follows that is learned.

With 49,152 tokens the head costs a fifth of a small model's multiplications, and its logits most of the memory.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from ..recipes import Row

IGNORED = -100
"""The label of what is not learned, as torch's cross entropy has it."""
SORTED_BATCHES = 32
"""Rows of so many batches are sorted by length before they are cut into batches, so that little padding is paid for."""


def order(lengths: Sequence[int], steps: int, batch: int, seed: int) -> list[int]:
    """The rows of all steps, one batch after the other: each as often as any other, those of a batch of like length.

    It is drawn before training begins, so a training that goes on needs nothing but the number of steps done.
    """
    rng = random.Random(seed)
    wanted = steps * batch
    drawn: list[int] = []
    while len(drawn) < wanted:
        drawn += rng.sample(range(len(lengths)), len(lengths))
    del drawn[wanted:]
    ordered: list[int] = []
    for start in range(0, wanted, batch * SORTED_BATCHES):
        group = sorted(drawn[start : start + batch * SORTED_BATCHES], key=lambda at: lengths[at])
        parts = [group[at : at + batch] for at in range(0, len(group), batch)]
        ordered += [at for part in rng.sample(parts, len(parts)) for at in part]
    return ordered


def padding(lengths: Sequence[int], at_once: int) -> float:
    """Share of the columns that are padding, where rows stand in this order and so many share a batch."""
    batches = [lengths[at : at + at_once] for at in range(0, len(lengths), at_once)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def features(row: Row) -> dict[str, list[int]]:
    """The row as the collator takes it: `input_ids`, and the `labels` of its answer."""
    labels = list(row.answer)
    if row.learned:
        labels = [token if learned else IGNORED for token, learned in zip(labels, row.learned, strict=True)]
    return {"input_ids": [*row.prompt, *row.answer], "labels": labels}


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads to the left, so that the answers of a batch end together and share the columns that the head is computed for."""

    end: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` [rows, width]; `labels` [rows, kept], which follow the columns `logits_to_keep`."""
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        kept = min(max(len(row["labels"]) for row in rows), width - 1)
        ids = torch.full((len(rows), width), self.end)
        mask = torch.zeros_like(ids)
        labels = torch.full((len(rows), kept), IGNORED)
        for at, row in enumerate(rows):
            length, learned = len(row["input_ids"]), row["labels"]
            ids[at, width - length :] = torch.tensor(row["input_ids"])
            mask[at, width - length :] = 1
            # What a row begins with is learned after nothing, so not at all.
            answer = min(len(learned), length - 1, kept)
            if answer:
                labels[at, kept - answer :] = torch.tensor(learned[-answer:])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            # Given as columns, not as their number: a slice of the hidden states would lie scattered, and its product is slow.
            "logits_to_keep": torch.arange(width - 1 - kept, width - 1),
        }


def answer_loss(
    outputs: CausalLMOutputWithPast, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Negative log-likelihood of the labels, over their number in the whole accumulated batch where that is told."""
    import torch

    logits = outputs.logits
    assert logits is not None
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    count = num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum()
    return total / max(count, 1)  # nothing may be learned of a batch
