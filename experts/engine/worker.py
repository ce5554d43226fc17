"""One thread that owns the model. PEFT's adapter switch is global to a model, so no other thread may touch it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ArtifactCorrupt, CollegiumError, ModelUnavailable, Overloaded
from ...schema import Delta, FinishReason, Sampling
from .text import TextStream

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

Item = Delta | CollegiumError
"""What a worker hands over: a piece of the answer, or why there is none."""

COLDEST = 0.01
"""Temperatures below it are greedy: dividing logits by them would overflow."""
LOADED_ADAPTERS = 16
"""Adapters kept in memory; the least recently used leaves."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT folder under the name of its content."""

    version: str
    folder: Path


class Generation:
    """A running answer: iterate over its deltas, or `listen` to them; `close` stops it."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.cancelled = threading.Event()
        self._deltas: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._listener: Callable[[Item], None] | None = None
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Delta]:
        """Deltas as they come, the last one with a finish reason. Raises what the worker raised."""
        while True:
            item = self._deltas.get()
            if isinstance(item, CollegiumError):
                raise item
            yield item
            if item.finish_reason:
                return

    def listen(self, listener: Callable[[Item], None]) -> None:
        """Call `listener` from the worker's thread with each delta, or the error, instead of keeping them."""
        with self._lock:
            while not self._deltas.empty():
                listener(self._deltas.get())
            self._listener = listener

    def close(self) -> None:
        """Stop generating before the next token."""
        self.cancelled.set()

    def put(self, item: Item) -> None:
        """Called by the worker."""
        with self._lock:
            (self._listener or self._deltas.put)(item)


@dataclass(frozen=True, slots=True)
class _Job:
    prompt: Sequence[int]
    adapter: Adapter | None
    sampling: Sampling
    seed: int | None
    deadline: float | None
    generation: Generation = field(compare=False)


class Engine:
    """Answers one request after another on one model; requests wait in a bounded queue, in order."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, max_queue: int = 64) -> None:
        self._model: Any = model  # a PeftModel from the first adapter on
        self._tokenizer = tokenizer
        self._end = int(tokenizer.eos_token_id)
        self._loaded: OrderedDict[str, Adapter] = OrderedDict()
        self._jobs: queue.Queue[_Job | None] = queue.Queue(max_queue)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="collegium-engine", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        """Tokens that the model can see, prompt and answer together."""
        return int(self._model.config.max_position_embeddings)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        adapter: Adapter | None = None,
        sampling: Sampling,
        seed: int | None = None,
        deadline: float | None = None,
    ) -> Generation:
        """Queue a request. Raises Overloaded where the queue is full, ModelUnavailable where the engine is closed."""
        if self._closed:
            raise ModelUnavailable("The engine is closed.", hint="Open Collegium again.")
        generation = Generation(len(prompt))
        try:
            self._jobs.put_nowait(_Job(prompt, adapter, sampling, seed, deadline, generation))
        except queue.Full:
            raise Overloaded(
                f"{self._jobs.maxsize} requests are waiting already.", hint="Try again in a few seconds."
            ) from None
        return generation

    def close(self) -> None:
        """Finish what runs, cancel what waits, and end the thread."""
        if self._closed:
            return
        self._closed = True
        while not self._jobs.empty():
            if job := self._jobs.get_nowait():
                job.generation.put(Delta("", finish_reason="cancelled"))
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while job := self._jobs.get():
            try:
                self._answer(job)
            except CollegiumError as error:
                job.generation.put(error)
            except Exception as error:  # the edge of the thread: the request fails, the engine goes on
                log.exception("a request failed in the engine")
                job.generation.put(CollegiumError(f"The model failed: {type(error).__name__}: {error}"))

    def _answer(self, job: _Job) -> None:
        import torch

        if job.generation.cancelled.is_set():
            job.generation.put(Delta("", finish_reason="cancelled"))
            return
        steps = _Steps(job, TextStream(self._decode, job.sampling.stop), self._end)
        prompt = torch.tensor([list(job.prompt)], device=self._model.device)
        # Without a seed of its own, a request must not go on where a seeded one before it stopped.
        torch.manual_seed(torch.seed() if job.seed is None else job.seed)
        with self._using(job.adapter), torch.inference_mode():
            self._model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=steps,
                stopping_criteria=[steps.should_stop],
                eos_token_id=self._end,
                pad_token_id=self._end,
                **_generation_options(job.sampling),
            )
        steps.finish()

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _using(self, adapter: Adapter | None) -> AbstractContextManager[object]:
        """The model with `adapter`, or as it is."""
        if adapter is None:
            return self._model.disable_adapter() if self._loaded else nullcontext()
        if adapter.version not in self._loaded:
            self._load(adapter)
        self._loaded.move_to_end(adapter.version)
        self._model.set_adapter(adapter.version)
        return nullcontext()

    def _load(self, adapter: Adapter) -> None:
        from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
        from safetensors.torch import load_file

        config = PeftConfig.from_pretrained(str(adapter.folder))
        config.inference_mode = True
        weights = load_file(adapter.folder / "adapter_model.safetensors")  # fails before the model is touched
        if isinstance(self._model, PeftModel):
            self._model.add_adapter(adapter.version, config)
        else:
            self._model = get_peft_model(self._model, config, adapter_name=adapter.version)
        self._model.eval()
        try:
            found: Any = set_peft_model_state_dict(self._model, weights, adapter_name=adapter.version)
            missing = [key for key in found.missing_keys if f".{adapter.version}." in key]
            if missing or found.unexpected_keys:
                wrong = (missing or found.unexpected_keys)[0]
                raise ArtifactCorrupt(f"The adapter {adapter.version} does not fit the model at {wrong}.")
        except BaseException:
            if self._loaded:
                self._model.delete_adapter(adapter.version)
            else:
                self._model = self._model.unload()  # takes the layers out again
            raise
        self._loaded[adapter.version] = adapter
        if len(self._loaded) > LOADED_ADAPTERS:
            oldest, _ = self._loaded.popitem(last=False)
            self._model.delete_adapter(oldest)


def _generation_options(sampling: Sampling) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "do_sample": sampling.temperature >= COLDEST,
    }
    if sampling.temperature >= COLDEST:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return options


class _Steps:
    """Follows one `generate`: transformers calls `put` with the prompt, then `should_stop` and `put` for each token."""

    def __init__(self, job: _Job, text: TextStream, end: int) -> None:
        self._job = job
        self._text = text
        self._end = end
        self._tokens = -1  # the prompt comes first
        self._reason: FinishReason = "length"

    def put(self, ids: torch.Tensor) -> None:
        self._tokens += 1
        if self._tokens == 0 or self._text.stopped or self._reason == "cancelled":
            return
        token = int(ids.reshape(-1)[-1])
        if token == self._end:
            self._reason = "stop"
            return
        self._job.generation.put(Delta(self._text.push(token), (token,)))

    def end(self) -> None:
        """Called by transformers at the end; `finish` does the work, after errors too."""

    def should_stop(self, ids: torch.Tensor, scores: object, **rest: object) -> torch.Tensor:
        import torch

        if self._text.stopped:
            self._reason = "stop"
        late = self._job.deadline is not None and time.monotonic() > self._job.deadline
        if self._job.generation.cancelled.is_set() or late:
            self._reason = "cancelled"
        return torch.full((ids.shape[0],), self._reason != "length", dtype=torch.bool, device=ids.device)

    def finish(self) -> None:
        rest = self._text.finish()
        reason: FinishReason = "stop" if self._text.stopped else self._reason
        self._job.generation.put(Delta(rest, finish_reason=reason))
