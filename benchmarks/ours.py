"""The engine under test, driven as the runtime drives it: requests in, tokens out, a time stamp at each."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
from workload import NEW_TOKENS, ROWS, AdapterFolder

from collegium.errors import CollegiumError
from collegium.experts.engine.generation import Item
from collegium.experts.engine.load import open_engine
from collegium.experts.engine.slots import Adapter
from collegium.models.cache import CachedModel
from collegium.schema import Sampling
from collegium.settings import Settings

DECODING = 160
"""Tokens that requests decode while a long prompt arrives: enough to outlast it."""
SETTLED = 16
"""Tokens that each has decoded when it does."""


class Trace:
    """When a request was sent and when each of its tokens came, in seconds."""

    def __init__(self) -> None:
        self.sent = time.perf_counter()
        self.tokens: list[float] = []
        self.error: CollegiumError | None = None
        self.done = threading.Event()

    def take(self, item: Item) -> None:
        """Called by the engine with each piece of the answer."""
        if isinstance(item, CollegiumError):
            self.error = item
            self.done.set()
            return
        now = time.perf_counter()
        self.tokens += [now] * len(item.token_ids)
        if item.finish_reason:
            self.done.set()

    def wait(self) -> None:
        """Until the answer is whole. Raises what the engine raised."""
        self.done.wait()
        if self.error:
            raise self.error


class Ours:
    """The engine on the base model."""

    def __init__(self, settings: Settings, base: CachedModel) -> None:
        self._engine = open_engine(base, settings)

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def tokens_per_second(self, prompts: Sequence[Sequence[int]], adapters: Sequence[AdapterFolder | None]) -> float:
        """New tokens/s over all requests, of which `ROWS` at most are in flight."""
        free = threading.Semaphore(ROWS)
        traces = []
        for prompt, adapter in zip(prompts, adapters, strict=True):
            free.acquire()
            traces.append(self._send(prompt, adapter, NEW_TOKENS, free))
        for trace in traces:
            trace.wait()
            assert len(trace.tokens) == NEW_TOKENS
        end = max(trace.tokens[-1] for trace in traces)
        assert not self._engine.stats().reused_tokens, "a cache of prefixes did some of the work"
        return float(len(traces) * NEW_TOKENS / (end - traces[0].sent))

    def first_token(self, prompt: Sequence[int], adapter: AdapterFolder | None) -> float:
        """Milliseconds to the first token of one request."""
        trace = self._send(prompt, adapter, 1)
        trace.wait()
        return 1000 * (trace.tokens[0] - trace.sent)

    def gaps(
        self, prompts: Sequence[Sequence[int]], long: Sequence[int], adapters: Sequence[AdapterFolder]
    ) -> tuple[float, float]:
        """95th percentile of the gaps between tokens of decoding requests, in milliseconds: first while a long prompt is read.

        That is from its arrival to its first token; the second figure is of all other times.
        """
        traces = [self._send(prompt, adapter, DECODING) for prompt, adapter in zip(prompts, adapters[1:], strict=True)]
        while not all(len(trace.tokens) >= SETTLED for trace in traces):
            time.sleep(0.001)
        arrived = self._send(long, adapters[0], 1)
        for trace in [*traces, arrived]:
            trace.wait()
        begin, end = arrived.sent, arrived.tokens[0]
        inside, outside = [], []
        for trace in traces:
            times = np.array(trace.tokens[1:])  # the first gaps are those of the others' prompts
            apart, overlaps = 1000 * np.diff(times), (times[1:] > begin) & (times[:-1] < end)
            inside += list(apart[overlaps])
            outside += list(apart[~overlaps])
        return float(np.percentile(inside, 95)), float(np.percentile(outside, 95))

    def _send(
        self,
        prompt: Sequence[int],
        adapter: AdapterFolder | None,
        tokens: int,
        free: threading.Semaphore | None = None,
    ) -> Trace:
        trace = Trace()
        sampling = Sampling(max_tokens=tokens, min_tokens=tokens)
        known = Adapter(adapter.name, adapter.folder) if adapter else None
        generation = self._engine.generate(prompt, adapter=known, sampling=sampling)

        def take(item: Item) -> None:
            trace.take(item)
            if free and trace.done.is_set():
                free.release()

        generation.listen(take)
        return trace
