"""The same prompt as somebody else would send it: mistyped, in other case, or wrapped in an instruction."""

from __future__ import annotations

import random

WRAPPERS = (
    "Answer with A, B, C or D.\n{}",
    "Question: {}\nAnswer:",
    "{}\nAnswer the question.",
    "Please answer: {}",
    "Read the following and answer.\n\n{}",
    "{}\n\nThink step by step.",
    "You are a helpful assistant.\n{}",
    "Task: {}",
    "{} Explain briefly.",
    "hi, {}",
    "Is the following true or false? {}",
    "Classify this text.\n{}",
    "Text: {}",
)
"""What data sets, agents and people put around a prompt; none of them says anything about its domain."""
SHARES = {"typos": 45, "lower": 10, "upper": 5, "bare": 5, "wrapped": 15, "careless": 20}
"""How often each is drawn, in parts of a hundred."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def augment(text: str, rng: random.Random) -> str:
    """One of: one to three typos, small letters, capitals, no end mark, a wrapper, or the first of these together."""
    match rng.choices(*zip(*SHARES.items(), strict=True))[0]:
        case "typos":
            return typos(text, rng, rng.randint(1, 3))
        case "lower":
            return text.lower()
        case "upper":
            return text.upper()
        case "bare":
            return text.rstrip(" ?.!")
        case "wrapped":
            return rng.choice(WRAPPERS).format(text)
    return typos(text.lower().rstrip(" ?.!"), rng, rng.randint(1, 3))


def typos(text: str, rng: random.Random, count: int = 2) -> str:
    """The text with `count` letters swapped, dropped, doubled or replaced."""
    letters = list(text)
    for _ in range(count):
        if len(letters) < len("word"):
            break
        at = rng.randrange(len(letters) - 1)
        match rng.randrange(4):
            case 0:
                letters[at], letters[at + 1] = letters[at + 1], letters[at]
            case 1:
                del letters[at]
            case 2:
                letters.insert(at, letters[at])
            case _:
                letters[at] = rng.choice(LETTERS)
    return "".join(letters)
