"""From examples to token rows: tasks in several wordings, and what the base model itself would say.

An expert answers people, not data sets. Rehearsal (the base model's own answers to questions as people ask them) keeps it
talking while it learns its tasks; *Replay to Remember* (2025) shows what is lost without.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...models.chat import ChatEncoder
from ...router.questions import free_questions
from ...schema import Message
from ..measuring.scoring import generate
from ..recipes import Row
from ..rows.examples import Example
from ..rows.wording import ask

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
    examples: Sequence[Example], chat: ChatEncoder, end: int, seed: int, *, instructions: bool = False
) -> list[Row]:
    """A row for each example, with the turns before it, in a wording drawn for it.

    With `instructions` the question's tokens are learned too: those of its text, not those of the chat template.
    """
    rng = random.Random(seed)
    closing = _closing(chat) if instructions else 0

    def row(example: Example) -> Row:
        asked = ask(example, rng=rng)
        prompt = chat.encode([*example.history, Message("user", asked)])
        answer = (*chat.text(example.answer), end)
        if not instructions:
            return Row(tuple(prompt), answer)
        begin = len(prompt) - closing - len(chat.text(asked))
        learned = (True,) * (len(prompt) - closing - begin) + (False,) * closing + (True,) * len(answer)
        return Row(tuple(prompt[:begin]), (*prompt[begin:], *answer), learned)

    return [row(example) for example in examples]


def blocks(texts: Sequence[str], chat: ChatEncoder, end: int, width: int) -> list[Row]:
    """The texts one after the other, an end token behind each, cut into rows of `width` tokens, all of which are learned.

    The last row is shorter. No token is padding but in the batch that the last row is in.
    """
    stream = [token for text in texts if text.strip() for token in (*chat.text(text), end)]
    return [Row((), tuple(stream[at : at + width])) for at in range(0, len(stream), width)]


def _closing(chat: ChatEncoder) -> int:
    """Tokens that the template puts between a question and its answer: what the encodings of two questions end with alike."""
    one, other = (chat.encode([Message("user", text)]) for text in "ab")
    return next(
        count for count, pair in enumerate(zip(reversed(one), reversed(other), strict=False)) if len({*pair}) > 1
    )
