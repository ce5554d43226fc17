"""What the engine and its rivals are given to do: prompts and adapters."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from collegium.experts.adapters import CONFIG, WEIGHTS
from collegium.experts.home import SHIPPED
from collegium.models.chat import ChatEncoder
from collegium.schema import Message

ROWS = 8
"""Requests at a time."""
NEW_TOKENS = 64
"""Tokens of each answer. The end token is masked until then, so that every contestant makes the same number."""
LONG_PROMPT = 1500
"""Tokens of the prompt that arrives while others decode."""
QUESTIONS = (
    "What is the difference between a tort and a crime?",
    "How do I list the files of a folder, newest first?",
    "Why was my card payment declined twice today?",
    "Which vitamins does a vegetarian diet lack?",
    "Why does ice float on water while iron sinks?",
    "Can my landlord keep the deposit for painting the walls?",
    "How do I find out which process listens on a port?",
    "What should I do about a sprained ankle?",
)


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A PEFT folder, under a name that PEFT takes as well."""

    name: str
    folder: Path

    @property
    def weights(self) -> Path:
        """Its safetensors file."""
        return self.folder / WEIGHTS


class Prompts:
    """Prompts of about 30 tokens, no two of which begin alike: a cache of prefixes must not answer in a rival's place."""

    def __init__(self, chat: ChatEncoder) -> None:
        self._chat = chat
        self._numbers = itertools.count(1)

    def short(self, count: int = ROWS) -> list[list[int]]:
        """`count` prompts, the eight questions in turn."""
        return [self._encode(question) for question in itertools.islice(itertools.cycle(QUESTIONS), count)]

    def long(self) -> list[int]:
        """A prompt of `LONG_PROMPT` tokens."""
        ids = self._encode(" ".join(QUESTIONS * 20))
        return ids[: LONG_PROMPT - 8] + ids[-8:]

    def _encode(self, question: str) -> list[int]:
        system = Message("system", f"{next(self._numbers)} is your number.")
        return self._chat.encode((system, Message("user", question)))


def shipped_adapters() -> list[AdapterFolder]:
    """The experts that the project ships."""
    folders = sorted(path.parent for path in (SHIPPED / "artifacts").glob(f"*/{WEIGHTS}"))
    return [AdapterFolder(f"shipped_{folder.name[:12]}", folder) for folder in folders]


def make_adapters(root: Path, count: int) -> list[AdapterFolder]:
    """The shipped adapters and, up to `count`, random ones of the same shape in `root`."""
    shipped = shipped_adapters()
    return [*shipped, *itertools.islice(_random_adapters(root, shipped[0]), max(0, count - len(shipped)))][:count]


def _random_adapters(root: Path, like: AdapterFolder) -> Iterator[AdapterFolder]:
    """Adapters without end: matrices of `like`'s sizes and types, normal and as wide as its own."""
    import torch
    from safetensors.torch import load_file, save_file

    pattern = load_file(like.weights)
    spread = {key: float(tensor.float().std()) for key, tensor in pattern.items()}
    config = (like.folder / CONFIG).read_text("utf-8")
    for number in itertools.count():
        folder = root / f"random_{number:03}"
        folder.mkdir()
        draw = torch.Generator().manual_seed(number)
        tensors = {
            key: (torch.randn(tensor.shape, generator=draw) * spread[key]).to(tensor.dtype)
            for key, tensor in pattern.items()
        }
        save_file(tensors, folder / WEIGHTS)
        (folder / CONFIG).write_text(config, "utf-8")
        with (folder / WEIGHTS).open("rb") as file:
            os.fsync(file.fileno())  # pages that are not on the disk yet cannot be dropped from memory
        yield AdapterFolder(folder.name, folder)


def forget(adapters: Sequence[AdapterFolder]) -> None:
    """Drop the files from the memory of the operating system, so that the next read is from the disk."""
    for adapter in adapters:
        with adapter.weights.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(adapters: Sequence[AdapterFolder]) -> None:
    """Read the files, so that the next read is from memory."""
    for adapter in adapters:
        adapter.weights.read_bytes()


def rank_and_alpha(adapter: AdapterFolder) -> tuple[int, float]:
    """The `r` and `lora_alpha` of its configuration."""
    config = json.loads((adapter.folder / CONFIG).read_text("utf-8"))
    return int(config["r"]), float(config["lora_alpha"])
