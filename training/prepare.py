"""From examples to token rows: tasks in several wordings, free questions, and a share of general chat.

An expert answers people, not data sets. Rehearsal (the base model's own answers to questions as people ask them) keeps it
talking while it learns its tasks; *Replay to Remember* (2025) shows what is lost without.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..models.chat import ChatEncoder
from ..router.questions import free_questions
from ..schema import Message
from .examples import Example
from .recipes import Row
from .scoring import generate
from .wording import ask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REHEARSALS = 4
"""How often each rehearsed answer is shown: shown twice, an expert still took a free question for a row of its task."""
GENERAL_QUESTIONS = 16
"""General questions that are rehearsed beside the domain's own."""
REHEARSED_TOKENS = 128


def rehearse(model: PreTrainedModel, chat: ChatEncoder, end: int, domain: str) -> list[Row]:
    """The base model's own answers to the free questions of `domain` and to general ones."""
    questions = [*free_questions()["general"][:GENERAL_QUESTIONS], *free_questions().get(domain, ())]
    questions = list(dict.fromkeys(questions))
    prompts = [chat.encode([Message("user", question)]) for question in questions]
    answers = generate(model, prompts, max_tokens=REHEARSED_TOKENS, end=end)
    # An answer that was cut at the limit did not end, so none is taught there.
    return [
        Row(tuple(prompt), (*answer, end) if len(answer) < REHEARSED_TOKENS else tuple(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer
    ]


def token_rows(
    tasks: Sequence[Example],
    general: Sequence[Example],
    rehearsed: Sequence[Row],
    chat: ChatEncoder,
    end: int,
    seed: int,
) -> list[Row]:
    """All training rows, shuffled: tasks in a wording drawn for each, general chat as it is, rehearsed answers."""
    rng = random.Random(seed)

    def row(prompt: str, answer: str) -> Row:
        return Row(tuple(chat.encode([Message("user", prompt)])), (*chat.text(answer), end))

    rows = [row(ask(example, rng=rng), example.answer) for example in tasks]
    rows += [row(example.prompt, example.answer) for example in general]
    rows += [*rehearsed] * REHEARSALS
    rng.shuffle(rows)
    return rows
