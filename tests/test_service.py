"""The endpoint on a real server, driven with the official client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from collegium.endpoint.wire import decision_to_dict
from collegium.errors import CollegiumError, Overloaded, SettingsError
from collegium.runtime import Answer, Collegium
from collegium.schema import Context, Delta, Sampling
from collegium.service import BODY_LIMIT, create_app, run
from collegium.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

LONG = 400  # tokens: long enough that nobody waits for the end
LAW = "explain the contract of the plaintiff"


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """A server on a free port of this machine; gives its URL."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, ws="none", log_config=None, timeout_graceful_shutdown=2))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens soon."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def url(collegium: Collegium) -> Iterator[str]:
    with serving(create_app(collegium=collegium)) as url:
        yield url


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def answers(collegium: Collegium, monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """The answers that the endpoint has begun."""
    begun: list[Answer] = []
    astream = collegium.astream

    async def recorded(prompt: Any, **options: Any) -> Answer:
        begun.append(await astream(prompt, **options))
        return begun[-1]

    monkeypatch.setattr(collegium, "astream", recorded)
    return begun


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def extra(value: Any) -> Any:
    """The `collegium` part of what the client has read."""
    return value.model_extra["collegium"]


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_the_routers_choice_answers(client: openai.OpenAI, collegium: Collegium, prompts: Mapping[str, str]) -> None:
    completion = client.chat.completions.create(model="auto", messages=said(prompts["law"]))
    expected = collegium.chat(prompts["law"])
    choice, usage = completion.choices[0], completion.usage
    assert usage is not None
    assert (completion.object, completion.id[:9]) == ("chat.completion", "chatcmpl-")
    assert abs(completion.created - time.time()) < 60
    assert completion.model == expected.expert_version == collegium.experts()["law"].version
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        expected.usage.prompt_tokens,
        expected.usage.completion_tokens,
    )
    ours = extra(completion)
    assert ours["decision"] == json.loads(json.dumps(decision_to_dict(expected.decision)))
    assert (ours["decision"]["expert"], ours["decision"]["reason"]) == ("law", "routed")
    assert (ours["expert_version"], ours["mode"], ours["citations"]) == (completion.model, "lora", [])
    assert set(ours["timings"]) == {"route", "retrieve", "first_token", "total"}


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI, collegium: Collegium) -> None:
    chunks = list(
        client.chat.completions.create(
            model="auto", messages=said(LAW), stream=True, stream_options={"include_usage": True}
        )
    )
    expected = collegium.chat(LAW)
    *pieces, last, counted = chunks
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.text
    assert len(pieces) > 2
    assert extra(pieces[0]) == {"decision": json.loads(json.dumps(decision_to_dict(expected.decision)))}
    assert last.choices[0].finish_reason == expected.finish_reason
    assert set(extra(last)) == {"citations", "expert_version", "mode", "paid", "timings"}
    assert counted.choices == []
    assert counted.usage is not None
    assert counted.usage.completion_tokens == expected.usage.completion_tokens
    assert {(chunk.id, chunk.model, chunk.object) for chunk in chunks} == {
        (chunks[0].id, expected.expert_version, "chat.completion.chunk")
    }


def test_the_wire_format_of_a_stream(http: httpx.Client) -> None:
    reply = http.post(
        "/v1/chat/completions", json={"messages": said(LAW), "stream": True, "user": "u1", "metadata": {}}
    )
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.text.isascii()
    assert reply.text.endswith("data: [DONE]\n\n")
    *chunks, done = events(reply.text)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert not any("usage" in chunk for chunk in chunks)


def test_the_async_client(url: str, collegium: Collegium) -> None:
    async def ask() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            whole = await client.chat.completions.create(model="code", messages=said("a bug"))
            stream = await client.chat.completions.create(model="code", messages=said("a bug"), stream=True)
            return whole.choices[0].message.content, "".join(
                [one.choices[0].delta.content or "" async for one in stream]
            )

    expected = collegium.chat("a bug", expert="code").text
    assert asyncio.run(ask()) == (expected, expected)


def test_an_expert_asked_for_by_name_or_version(client: openai.OpenAI, collegium: Collegium) -> None:
    version = collegium.experts()["code"].version
    named: list[dict[str, Any]] = [
        {"model": "code"},
        {"model": version},
        {"model": "auto", "extra_body": {"collegium": {"expert": "code"}}},
    ]
    for one in named:
        completion = client.chat.completions.create(messages=said(LAW), **one)
        assert (completion.model, extra(completion)["decision"]["reason"]) == (version, "explicit")
    with pytest.raises(openai.BadRequestError, match=r"'law'.*'code'"):
        client.chat.completions.create(
            model="law", messages=said(LAW), extra_body={"collegium": {"expert": "code", "retrieve": False}}
        )


def test_domains_limit_the_choice(client: openai.OpenAI) -> None:
    def choose(*domains: str) -> Any:
        options = {"collegium": {"domains": domains}}
        return client.chat.completions.create(model="auto", messages=said(LAW), extra_body=options)

    assert set(extra(choose("code", "math"))["decision"]["probabilities"]) == {"code", "math"}
    with pytest.raises(openai.NotFoundError, match="cooking") as caught:
        choose("cooking")
    assert caught.value.param == "collegium.domains"


def test_sampling_is_the_requests_else_the_settings(client: openai.OpenAI, collegium: Collegium) -> None:
    def ask(**options: Any) -> Any:
        completion = client.chat.completions.create(model="law", messages=said(LAW), **options)
        return completion.choices[0].message.content, completion.choices[0].finish_reason

    text, reason = ask()
    assert reason == "length"  # the settings' max_tokens
    assert ask(max_tokens=3) == ask(max_completion_tokens=3)
    assert len(ask(max_tokens=3)[0]) < len(text)
    cut = text[len(text) // 2]
    assert ask(stop=cut) == ask(stop=[cut, "\n\n\n"]) == (text.partition(cut)[0], "stop")
    hot = {"temperature": 1.5, "top_p": 0.9, "n": 1, "response_format": {"type": "text"}}
    assert ask(seed=7, **hot) == ask(seed=7, **hot)
    assert len({ask(seed=seed, **hot) for seed in range(4)}) > 1


def test_contents_in_parts_and_the_developers_role(client: openai.OpenAI, collegium: Collegium) -> None:
    parts = [{"type": "text", "text": "explain the "}, {"type": "text", "text": "contract"}]
    messages: list[Any] = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    completion = client.chat.completions.create(model="law", messages=messages)
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "explain the contract"}]
    assert completion.choices[0].message.content == collegium.chat(plain, expert="law").text


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", "required"),
        ({"messages": said(" ")}, None, "empty"),
        ({"messages": []}, None, "not empty"),
        ({"messages": said("a\x00b")}, None, "NUL"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, None, "last message"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role", "'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "'image_url'"),
        ({"messages": said(LAW), "tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"messages": said(LAW), "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"messages": said(LAW), "n": 2}, "n", "1"),
        ({"messages": said(LAW), "temperature": 3}, "temperature", "less than or equal to 2"),
        ({"messages": said(LAW), "seed": 2**80}, "seed", "less than or equal"),
        ({"messages": said(LAW), "max_tokens": 0}, "max_tokens", "greater than"),
        ({"messages": said(LAW), "collegium": {"top": 1}}, "collegium.top", "expert, domains, alpha, retrieve"),
        ({"messages": said(LAW), "collegium": {"alpha": -1}}, "collegium.alpha", "greater than"),
        ({"messages": said(LAW), "collegium": {"domains": []}}, "collegium.domains", "at least 1"),
        ({"messages": said(LAW + " tort" * 500)}, "messages", "Shorten"),
    ],
)
def test_what_is_wrong_is_said(http: httpx.Client, body: Any, param: str | None, message: str) -> None:
    for stream in (False, True):
        reply = http.post("/v1/chat/completions", json={"stream": stream, **body})
        error = reply.json()["error"]
        assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert message in error["message"]


def test_bodies_that_are_no_request(http: httpx.Client) -> None:
    for content in ("{", "[]", '"text"', "", '{"messages": [{"role": "user", "content": "\\ud800"}]}', "[" * 100_000):
        reply = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
    forged = http.post("/v1/chat/completions", content='{"messages": []}', headers={"Content-Type": "text/plain"})
    assert forged.status_code == 400  # what any web page may send
    surrogate = '{"messages": [], "collegium": {"\\ud800": 1}}'
    reply = http.post("/v1/chat/completions", content=surrogate, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400


def test_bodies_that_are_too_long(http: httpx.Client) -> None:
    long = b" " * (BODY_LIMIT + 1)

    def pieces() -> Iterator[bytes]:
        yield from (long[at : at + 2**18] for at in range(0, len(long), 2**18))

    for content in (long, pieces()):
        reply = http.post("/v1/route", content=content, headers={"Content-Type": "application/json"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")


def test_errors_of_the_official_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"'nobody'.*base, code, law") as caught:
        client.chat.completions.create(model="nobody", messages=said(LAW))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.chat.completions.create(model="auto", messages=said(""))
    with pytest.raises(openai.NotFoundError, match="base, code, law"):
        client.models.retrieve("nobody")


def test_models(client: openai.OpenAI, collegium: Collegium) -> None:
    listed = {one.id: one for one in client.models.list()}
    law = collegium.experts()["law"]
    assert set(listed) == {"auto", "base", "code", "law"}
    assert extra(listed["law"]) == {"domain": "law", "version": law.version, "description": law.evidence.description}
    assert {one.object for one in listed.values()} == {"model"}
    for name in ("auto", "law", law.version):
        assert client.models.retrieve(name).object == "model"


def test_route(http: httpx.Client, collegium: Collegium, prompts: Mapping[str, str]) -> None:
    def route(value: Any) -> list[Any]:
        return list(http.post("/v1/route", json={"input": value}).json()["decisions"])

    assert [one["expert"] for one in route(prompts["law"])] == ["law"]
    several = route([prompts[name] for name in ("code", "law", "unknown")])
    assert [one["expert"] for one in several] == ["code", "law", "base"]
    conversation = [*said(prompts["code"]), {"role": "assistant", "content": "yes"}, *said(prompts["law"])]
    assert [one["expert"] for one in route(conversation)] == ["law"]
    decision = route(prompts["unknown"])[0]
    assert (decision["reason"], decision["domain"]) == ("unknown_domain", None)
    assert set(decision["probabilities"]) == {"law", "code", "health", "math"}
    assert all(round(p, 4) == p for p in decision["probabilities"].values())
    for wrong in (None, 3, [], [""], ["a", 3], ["a", said("b")[0]], "", {"text": "a"}):
        reply = http.post("/v1/route", json={"input": wrong})
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error"), wrong


def test_streams_of_two_experts_at_once(client: openai.OpenAI, collegium: Collegium) -> None:
    asked = [(name, f"explain the {name} number {at % 3}") for at in range(20) for name in [("law", "code")[at % 2]]]
    expected = {one: collegium.chat(one[1], expert=one[0], sampling=Sampling(8)).text for one in set(asked)}

    def ask(one: tuple[str, str]) -> tuple[str, str]:
        chunks = list(client.chat.completions.create(model=one[0], messages=said(one[1]), stream=True, max_tokens=8))
        return chunks[0].model.split("@")[0], "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(20) as pool:
        for one, answer in zip(asked, pool.map(ask, asked), strict=True):
            assert answer == (one[0], expected[one])


@pytest.fixture
def slow_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token takes as long as a large model's."""
    from collegium.experts.engine.model import Model

    fast = Model.run

    def slow(model: Model, planned: Any) -> None:
        time.sleep(0.005)
        fast(model, planned)

    monkeypatch.setattr(Model, "run", slow)


def test_a_client_that_goes_away_frees_the_engine(
    client: openai.OpenAI, url: str, answers: list[Answer], slow_model: None
) -> None:
    stream = client.chat.completions.create(model="law", messages=said(LAW), stream=True, max_tokens=LONG)
    next(iter(stream))
    stream.close()
    until(answers[0].generation.cancelled.is_set)
    whole = {"model": "law", "messages": said(LAW), "max_tokens": LONG}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=whole, timeout=0.1)
    until(lambda: len(answers) == 2 and answers[1].generation.cancelled.is_set())
    assert client.chat.completions.create(model="code", messages=said(LAW)).choices[0].finish_reason == "length"
    assert all(answer.reply.usage.completion_tokens < LONG for answer in answers[:2])


@pytest.fixture
def answer_with(collegium: Collegium, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that sets what every answer hands over from now on."""
    from collegium.experts.engine.generation import Generation

    def answer_with(*items: Delta | CollegiumError) -> None:
        async def astream(prompt: Any, **options: Any) -> Answer:
            generation = Generation(3)
            for item in items:
                generation.put(item)
            return Answer(collegium.route(prompt), Context(), "law@1", "lora", generation, {}, time.perf_counter())

        monkeypatch.setattr(collegium, "astream", astream)

    return answer_with


def test_an_error_in_mid_stream_is_an_event(
    client: openai.OpenAI, http: httpx.Client, answer_with: Callable[..., None]
) -> None:
    answer_with(Delta("Once", (1,)), CollegiumError("The model broke.", hint="Mend it."))
    reply = http.post("/v1/chat/completions", json={"messages": said(LAW), "stream": True})
    first, error = events(reply.text)
    assert (reply.status_code, first["choices"][0]["delta"]["content"]) == (200, "Once")
    assert (error["error"]["message"], error["error"]["code"]) == ("The model broke. Mend it.", "internal_error")
    with pytest.raises(openai.APIError, match="The model broke"):
        list(client.chat.completions.create(model="auto", messages=said(LAW), stream=True))
    with pytest.raises(openai.InternalServerError, match="The model broke"):
        client.chat.completions.create(model="auto", messages=said(LAW))


def test_an_answer_cut_off_is_not_passed_off_as_whole(http: httpx.Client, answer_with: Callable[..., None]) -> None:
    cut = Delta("", finish_reason="cancelled")
    answer_with(cut)
    for stream in (False, True):
        reply = http.post("/v1/chat/completions", json={"messages": said(LAW), "stream": stream})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_unavailable")
    answer_with(Delta("Once", (1,)), cut)
    reply = http.post("/v1/chat/completions", json={"messages": said(LAW), "stream": True})
    assert events(reply.text)[-1]["error"]["code"] == "model_unavailable"


def test_a_full_queue(http: httpx.Client, collegium: Collegium, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(prompt: Any, **options: Any) -> Answer:
        raise Overloaded("64 requests are waiting already.")

    monkeypatch.setattr(collegium, "astream", full)
    reply = http.post("/v1/chat/completions", json={"messages": said(LAW), "stream": True})
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "overloaded")
    assert int(reply.headers["retry-after"]) > 0


def test_errors_outside_of_chat(
    http: httpx.Client, collegium: Collegium, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    missing, wrong = http.get("/v1/nothing"), http.get("/v1/route")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")

    def broken() -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(collegium, "experts", broken)
    reply = http.get("/v1/models")
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in reply.text
    until(lambda: "a secret" in caplog.text)


def test_prompts_are_not_logged(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for body in ({"messages": said("xyzzy")}, {"messages": said("xyzzy"), "n": 2}, {"messages": ["xyzzy"]}):
        http.post("/v1/chat/completions", json=body)
    assert "POST" in caplog.text
    assert "xyzzy" not in caplog.text


def test_it_answers_once_loaded(tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    go, opened = threading.Event(), []
    real = Collegium.open

    def slow(settings: Settings) -> Collegium:
        assert go.wait(20)
        opened.append(real(settings))
        return opened[0]

    monkeypatch.setattr(Collegium, "open", slow)
    with serving(create_app(tiny_settings)) as url, httpx.Client(base_url=url) as http:
        assert http.get("/healthz").json() == {"status": "alive"}
        for early in (http.get("/readyz"), http.post("/v1/chat/completions", json={"messages": said(LAW)})):
            assert (early.status_code, early.json()["error"]["code"]) == (503, "model_unavailable")
            assert int(early.headers["retry-after"]) > 0
        go.set()
        until(lambda: http.get("/readyz").status_code == 200)
        assert http.post("/v1/chat/completions", json={"messages": said(LAW)}).status_code == 200
    with pytest.raises(CollegiumError, match="closed"):
        opened[0].chat(LAW)


def test_a_server_that_cannot_load_says_why(tiny_settings: Settings) -> None:
    wrong = tiny_settings.model_copy(update={"base_model": "nothing-like-a-model"})
    with serving(create_app(wrong)) as url, httpx.Client(base_url=url) as http:
        until(lambda: "nothing-like-a-model" in http.get("/readyz").text)
        reply = http.get("/v1/models")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "invalid_request")
        assert "retry-after" not in reply.headers
        assert http.get("/healthz").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_hosts_that_others_reach_are_refused(tiny_settings: Settings, host: str) -> None:
    with pytest.raises(SettingsError, match="Keys come first"):
        run(tiny_settings.model_copy(update={"host": host}))
