"""A model of transformers that is measured: what the engine's answers are held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from collegium.training.measuring.answerer import Question
from collegium.training.measuring.scoring import choice_logprobs, generate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class TorchAnswerer:
    """A model of transformers, as it stands; its answers stop before the token `end`."""

    model: PreTrainedModel | PeftModel
    end: int

    def logprobs(self, questions: Sequence[Question]) -> Iterator[list[list[float]]]:
        """One question after the other."""
        return (choice_logprobs(self.model, prompt, answers) for prompt, answers in questions)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
        """All, in batches of like length, before the first is told."""
        return iter(generate(self.model, prompts, max_tokens=max_tokens, end=self.end))
