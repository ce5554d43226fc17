"""For tests of the engine: answers as values, decoders that a test holds and breaks, adapters that say one word."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from collegium.errors import CollegiumError, ModelUnavailable
from collegium.experts.engine.batch import MOST_PROMPT_TOKENS, Batch, Decoder, Floats
from collegium.experts.engine.engine import Engine
from collegium.experts.engine.generation import Generation, Item
from collegium.experts.engine.lora import LoraWeights
from collegium.experts.engine.native import library
from collegium.schema import Delta, FinishReason

Precision = Literal["float32", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "int8")
MARGIN = 1e-4
"""Where the two likeliest tokens are nearer to each other, sums in another order may choose the other one."""
PATIENCE = 10
"""Seconds after which a test gives up waiting."""


@dataclass(frozen=True)
class Answer:
    """All that came out of a generation."""

    tokens: tuple[int, ...]
    text: str
    reason: FinishReason | None
    logprobs: tuple[float, ...] = ()
    tops: tuple[tuple[tuple[int, float], ...], ...] = ()
    error: CollegiumError | None = None


def collect(generation: Generation, patience: float = PATIENCE) -> Answer:
    """Wait for the end of an answer, not for ever; an error is part of it."""
    items = queue.SimpleQueue[Item]()
    generation.listen(items.put)
    deltas: list[Delta] = []
    error = None
    while error is None and not (deltas and deltas[-1].finish_reason):
        item = items.get(timeout=patience)
        if isinstance(item, CollegiumError):
            error = item
        else:
            deltas.append(item)
    return Answer(
        tokens=tuple(token for delta in deltas for token in delta.token_ids),
        text="".join(delta.text for delta in deltas),
        reason=deltas[-1].finish_reason if deltas else None,
        logprobs=tuple(one for delta in deltas for one in delta.logprobs or ()),
        tops=tuple(one for delta in deltas for one in delta.top_logprobs or ()),
        error=error,
    )


def until(done: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait until something is so."""
    end = time.monotonic() + patience
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def is_idle(engine: Engine) -> bool:
    """Whether nobody runs or waits; checks that then nothing is held."""
    stats = engine.stats()
    if stats.running or stats.waiting:
        return False
    assert (stats.pages_used, stats.adapters_used) == (0, 0)
    return True


def open_decoder(
    folder: Path, precision: Precision = "float32", *, pages: int = 128, slots: int = 4, max_rows: int = 32
) -> Decoder:
    """A decoder of a tiny model. Skips the test where there is no C compiler for int8."""
    import torch

    from collegium.experts.engine.dense import DenseDecoder
    from collegium.experts.engine.int8 import Int8Decoder

    if precision == "float32":
        return DenseDecoder(folder, device=torch.device("cpu"), dtype=torch.float32, pages=pages, slots=slots)
    try:
        library()
    except ModelUnavailable as error:
        pytest.skip(str(error))
    return Int8Decoder(folder, pages=pages, slots=slots, most_tokens=max_rows + MOST_PROMPT_TOKENS, threads=1)


class Doubled:
    """A decoder that a test can hold before a pass, and break; what it was given is in `passes`."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.shape = decoder.shape
        self.precision: Precision = "int8" if decoder.precision == "int8" else "float32"
        self.pages, self.slots, self.page_bytes = decoder.pages, decoder.slots, decoder.page_bytes
        self._changed = threading.Condition()
        self.reset()

    def reset(self) -> None:
        """Forget all; for the next test, once no engine runs on it."""
        self.passes: list[list[int]] = []
        """Of each pass, the tokens of each sequence."""
        self.loads: list[str] = []
        """Versions, in the order in which they were put into slots."""
        self.failures: list[BaseException | None] = []
        """What each of the next passes raises."""
        self.closed = False
        self._permits: int | None = None  # None for as many as are wanted
        self._entered = 0

    def hold(self) -> None:
        """From now on, a pass waits for `step`."""
        with self._changed:
            self._permits = 0

    def let_go(self) -> None:
        """Passes wait no longer."""
        with self._changed:
            self._permits = None
            self._changed.notify_all()

    def wait(self) -> None:
        """Until the engine stands before a pass."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._entered > len(self.passes), PATIENCE), "no pass came"

    def step(self, passes: int = 1) -> None:
        """Let some passes through, and wait until the engine stands before the one after them."""
        for _ in range(passes):
            self.wait()
            with self._changed:
                assert self._permits is not None
                self._permits += 1
                done = len(self.passes) + 1
                self._changed.notify_all()
                assert self._changed.wait_for(lambda before=done: len(self.passes) == before, PATIENCE)  # type: ignore[misc]
        self.wait()

    def forward(self, batch: Batch) -> Floats:
        """The decoder's, when a test lets it."""
        with self._changed:
            self._entered += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._permits is None or self._permits > 0, PATIENCE)
            self._permits = None if self._permits is None else self._permits - 1
            self.passes.append(np.bincount(batch.sequence, minlength=len(batch.slots)).tolist())
            failure = self.failures.pop(0) if self.failures else None
        if failure:
            raise failure
        return self._decoder.forward(batch)

    def load(self, slot: int, lora: LoraWeights) -> None:
        """The decoder's."""
        self._decoder.load(slot, lora)
        self.loads.append(lora.version)

    def close(self) -> None:
        """The decoder stays: other tests go on with it."""
        self.closed = True


class Remote:
    """A row that a pool of threads computes, from what follows `prompt`."""

    def __init__(
        self, prompt: Sequence[int], logits: Callable[[Sequence[int]], Floats], pool: Executor, delay: float = 0
    ) -> None:
        self._prompt, self._logits, self._pool, self._delay = prompt, logits, pool, delay
        self.asked: list[tuple[int, ...]] = []

    def logits(self, generated: Sequence[int]) -> Future[Floats]:
        """Of the next token."""
        self.asked.append(tuple(generated))
        return self._pool.submit(self._compute, generated)

    def _compute(self, generated: Sequence[int]) -> Floats:
        time.sleep(self._delay)
        row: Floats = self._logits([*self._prompt, *generated])[-1]
        return row


class Promised:
    """A row whose futures a test fulfils, or does not."""

    def __init__(self) -> None:
        self.futures: list[Future[Floats]] = []

    def logits(self, generated: Sequence[int]) -> Future[Floats]:
        """A new future."""
        self.futures.append(Future())
        return self.futures[-1]


@contextmanager
def no_thread_is_left() -> Iterator[None]:
    """Checks that the engines that were opened within are gone."""
    before = set(threading.enumerate())
    yield
    left = [one for one in threading.enumerate() if one.name == "collegium-engine" and one not in before]
    assert not left


def marker_lora(folder: Path, base: Path, token: int) -> Path:
    """An adapter that answers `token` over and over, whatever it is asked.

    In the last layer, gate and up become equal on as many neurons as the model is wide: `silu(x) x` is never negative, so their
    sum is some positive number, and down turns it into the direction of the token, far longer than what else is there.
    """
    from safetensors import safe_open
    from safetensors.numpy import save_file

    config = json.loads((base / "config.json").read_text("utf-8"))
    hidden, inner, last = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"] - 1
    with safe_open(base / "model.safetensors", "np") as tensors:
        norm, head = tensors.get_tensor("model.norm.weight"), tensors.get_tensor("lm_head.weight")
        mlp = {name: tensors.get_tensor(f"model.layers.{last}.mlp.{name}_proj.weight") for name in ("gate", "up")}
    direction = head[token] / norm
    pairs = {name: (np.eye(hidden) - weight[:hidden], np.eye(inner, hidden)) for name, weight in mlp.items()}
    picks = np.zeros((hidden, inner))
    picks[0, :hidden] = 1
    pairs["down"] = (picks, np.outer(1000 * direction / np.linalg.norm(direction), np.eye(hidden)[0]))
    folder.mkdir(parents=True)
    tensors = {
        f"base_model.model.model.layers.{last}.mlp.{name}_proj.lora_{half}.weight": matrix.astype(np.float32)
        for name, pair in pairs.items()
        for half, matrix in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": hidden, "lora_alpha": hidden, "target_modules": [f"{one}_proj" for one in pairs]}
    (folder / "adapter_config.json").write_text(json.dumps(about | {"layers_to_transform": [last]}), "utf-8")
    return folder


def assert_agrees(
    found: Sequence[int], expected: Sequence[int], prompt: Sequence[int], logits: Callable[[Sequence[int]], Floats]
) -> None:
    """Greedy tokens are those expected, or part from them where `logits` hardly prefer one (MARGIN)."""
    for at, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one != other:
            second, first = np.sort(logits([*prompt, *expected[:at]])[-1])[-2:]
            assert first - second <= MARGIN, f"token {at}: {one} instead of {other}"
            return
