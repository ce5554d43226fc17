"""A server of a real, tiny model with OpenAI's API, llama.cpp's own, and the gaps and failures that servers have."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from numpy.typing import NDArray

from collegium.experts.engine.batch import Floats
from collegium.experts.engine.combine import log_sum_exp

Body = dict[str, Any]


@dataclass
class Abilities:
    """What the server can do, may be asked for, and how it fails. A test changes them as it goes."""

    completions: bool = True
    chat: bool = True
    native: bool = False
    token_ids: bool = True
    by_id: bool = True
    """Whether `return_tokens_as_token_ids` is honoured."""
    top: int = 100_000
    """Most log-probabilities a place; more are cut silently."""
    strict: bool = False
    """Whether asking for more than `top` is refused instead."""
    logprobs: bool = True
    """Whether asking for any is not refused with 400."""
    prompt: Literal["none", "field", "echo"] = "none"
    bias: bool = True
    begins: bool = False
    hides_end: bool = False
    """Whether there is nothing to read where the end is drawn, as llama-cpp-python has it."""
    delay: float = 0.0
    dies_after: int | None = None
    """Requests, or pieces of a chat, after which connections break."""
    failures: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Status and headers of the next replies."""
    odd: Body = field(default_factory=dict)
    """What is said instead to whoever asks for what follows a text."""
    moved: str = ""
    """Where requests are redirected to."""


@dataclass(frozen=True)
class Received:
    """One request."""

    path: str
    headers: Mapping[str, str]
    body: Body


class Model:
    """The weights, in float32, and the tokenizer."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        from collegium.tests.engine_models import reference

        self.logits: Callable[[Sequence[int]], Floats] = reference(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.texts = [str(self.tokenizer.decode([token])) for token in range(len(self.tokenizer))]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, special ones among them."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def logprobs(self, tokens: Sequence[int]) -> Floats:
        """Of what follows each token, `[T, vocab]`."""
        logits = self.logits(tokens)
        return np.stack([row - np.float32(log_sum_exp(row)) for row in logits])

    def greedy(self, prompt: Sequence[int], most: int) -> list[int]:
        """The answer that the model gives by itself."""
        found: list[int] = []
        while len(found) < most:
            token = int(self.logits([*prompt, *found])[-1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            found.append(token)
        return found


class RemoteServer:
    """One server. `received` are the requests, in their order."""

    def __init__(self, model: Model) -> None:
        self.model, self.can = model, Abilities()
        self.received: list[Received] = []
        self.url = ""
        self.active = self.most_active = 0
        self._lock = threading.Lock()

    @contextmanager
    def acting(self, **abilities: Any) -> Iterator[Self]:
        """With these abilities, for the time of the block."""
        self.can, self.most_active = Abilities(**abilities), 0
        self.received.clear()
        yield self

    def calls(self, path: str = "/v1/completions") -> list[Body]:
        """The bodies that came to a path."""
        return [one.body for one in self.received if one.path == path]

    def app(self) -> FastAPI:
        """The routes."""
        app = FastAPI()

        @app.post("/{path:path}")
        async def receive(path: str, request: Request) -> Response:
            from starlette.concurrency import run_in_threadpool

            body = json.loads(await request.body())
            self.received.append(Received(f"/{path}", dict(request.headers), body))
            if self.can.failures:
                status, headers = self.can.failures.pop(0)
                return JSONResponse({"error": f"no, {request.headers.get('authorization')}"}, status, headers)
            return await run_in_threadpool(self._respond, path, body)

        return app

    def _respond(self, path: str, body: Body) -> Response:
        with self._lock:
            self.active += 1
            self.most_active = max(self.active, self.most_active)
        try:
            time.sleep(self.can.delay)
            return self._answer(path, body)
        finally:
            with self._lock:
                self.active -= 1

    def _answer(self, path: str, body: Body) -> Response:
        can = self.can
        if can.moved:
            return Response(status_code=307, headers={"location": can.moved})
        routes = {"v1/completions": can.completions, "completion": can.native, "v1/chat/completions": can.chat}
        if not routes.get(path):
            return _refuse(404)
        if path == "v1/chat/completions":
            return self._chat(body)
        if can.dies_after is not None:
            can.dies_after -= 1
            if can.dies_after < 0:
                return StreamingResponse(_dying(iter([b"{"])), headers={"content-length": "1000"})
        if can.odd:
            return JSONResponse(can.odd)
        return self._native(body) if path == "completion" else self._completions(body)

    def _tokens(self, prompt: Any) -> list[int] | None:
        if isinstance(prompt, str):
            ids = self.model.encode(prompt)
            return [self.model.tokenizer.bos_token_id, *ids] if self.can.begins else ids
        return list(prompt) if self.can.token_ids else None

    def _completions(self, body: Body) -> Response:
        can, tokens, asked = self.can, self._tokens(body["prompt"]), body.get("logprobs")
        if tokens is None:
            return _refuse(422)
        if asked is not None and (not can.logprobs or (can.strict and asked > can.top)):
            return _refuse(400)
        rows = self.model.logprobs(tokens)
        drawn = self._draw(rows[-1], body.get("logit_bias", {}).items())
        end = drawn == self.model.tokenizer.eos_token_id
        name = self._by_id if can.by_id and body.get("return_tokens_as_token_ids") else self._by_text
        places: list[Any] = [] if end and can.hides_end else [self._top(rows[-1], drawn, asked or 0, name)]
        if can.prompt == "echo" and body.get("echo"):
            before = zip(rows[:-1], tokens[1:], strict=True)
            places = [None, *(self._top(row, token, asked or 0, name) for row, token in before), *places]
        choice: Body = {"index": 0, "text": "" if end else self.model.texts[drawn]}
        choice |= {"finish_reason": "stop" if end else "length"}
        choice["logprobs"] = None if asked is None else {"top_logprobs": places}
        if can.prompt == "field" and (count := body.get("prompt_logprobs")) is not None:
            before = zip(rows[:-1], tokens[1:], strict=True)
            choice["prompt_logprobs"] = [None, *(self._field(row, token, count) for row, token in before)]
        return JSONResponse({"choices": [choice], "usage": {"prompt_tokens": len(tokens), "completion_tokens": 1}})

    def _native(self, body: Body) -> Response:
        tokens = self._tokens(body["prompt"])
        if tokens is None:
            return _refuse(400)
        row = self.model.logprobs(tokens)[-1]
        drawn = self._draw(row, body.get("logit_bias", ()))
        tops = [self._listed(row, int(one)) for one in self._best(row, body.get("n_probs", 0))]
        place = self._listed(row, drawn) | {"top_logprobs": tops}
        reply: Body = {"content": self.model.texts[drawn], "tokens_evaluated": len(tokens), "tokens_predicted": 1}
        return JSONResponse(reply | ({"completion_probabilities": [place]} if tops and self.can.logprobs else {}))

    def _chat(self, body: Body) -> Response:
        prompt: Any = self.model.tokenizer.apply_chat_template(
            body["messages"], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        drawn = self.model.greedy(prompt, body["max_tokens"])
        whole = len(drawn) < body["max_tokens"]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(drawn)}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "".join(self.model.texts[token] for token in drawn)}
            return JSONResponse({"choices": [{"message": message}], "usage": usage})

        def events() -> Iterator[bytes]:
            for count, token in enumerate(drawn):
                time.sleep(self.can.delay)
                if count == self.can.dies_after:
                    raise ConnectionAbortedError
                yield _event({"choices": [{"delta": {"content": self.model.texts[token]}}]})
            yield _event({"choices": [{"delta": {}, "finish_reason": "stop" if whole else "length"}]})
            yield _event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    def _draw(self, row: Floats, bias: Any) -> int:
        row = row.copy()
        for token, value in bias if self.can.bias else ():
            row[int(token)] += value
        return int(row.argmax())

    def _best(self, row: Floats, count: int) -> NDArray[np.intp]:
        return np.argsort(-row, kind="stable")[: min(count, self.can.top)]

    def _top(self, row: Floats, token: int, count: int, name: Callable[[int], str]) -> dict[str, float]:
        return {name(int(one)): float(row[one]) for one in (*self._best(row, count), token)}

    def _field(self, row: Floats, token: int, count: int) -> dict[str, Any]:
        return {str(one): {"logprob": float(row[one])} for one in (*self._best(row, count), token)}

    def _listed(self, row: Floats, token: int) -> Body:
        return {"id": token, "token": self.model.texts[token], "logprob": float(row[token])}

    def _by_id(self, token: int) -> str:
        return f"token_id:{token}"

    def _by_text(self, token: int) -> str:
        return self.model.texts[token]


@contextmanager
def serving(model: Model) -> Iterator[RemoteServer]:
    """A server on this machine, for the time of the block."""
    remote = RemoteServer(model)
    config = uvicorn.Config(remote.app(), port=0, log_config=None, access_log=False, ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    remote.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    yield remote
    server.should_exit = server.force_exit = True
    thread.join()


def _refuse(status: int) -> Response:
    return JSONResponse({"error": {"message": "This server does not do that."}}, status)


def _event(body: Body) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()


def _dying(pieces: Iterator[bytes]) -> Iterator[bytes]:
    yield from pieces
    raise ConnectionAbortedError
