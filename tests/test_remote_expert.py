"""Remote black boxes on real, tiny weights: the same tokens as in process, whatever the server can do and however it fails."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collegium.errors import InvalidRequest, RemoteUnavailable, UnsupportedModel
from collegium.experts.engine.tail import completed, total_variation
from collegium.experts.kinds import Expert, Host, open_expert
from collegium.experts.remote.demonstrations import store
from collegium.experts.remote.expert import find_capabilities
from collegium.models.cache import CachedModel
from collegium.schema import Base, Card, Combination, Evidence, ExpertRequest, Message, Paid, Proxy, Remote, Sampling
from collegium.tests.engine_doubles import Answer, collect, until
from collegium.tests.engine_models import hosting, reference
from collegium.tests.remote_server import Model, RemoteServer, serving

TOKENS = 10
NUMBERS = itertools.count()
QUESTION = "explain the contract"
ASKED = ExpertRequest((Message("user", QUESTION),), "x", sampling=Sampling(max_tokens=TOKENS))
SEEDED = replace(ASKED, sampling=Sampling(max_tokens=TOKENS, temperature=0.8, top_p=0.9), seed=7)


@pytest.fixture(scope="module")
def large(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model with other weights, and the same vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name:
                weight.add_(0.05 * torch.randn_like(weight))
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tiny_base: Path, large: Path) -> dict[str, Model]:
    return {"base": Model(tiny_base), "large": Model(large)}


@pytest.fixture(scope="module")
def servers(models: Mapping[str, Model]) -> Iterator[dict[str, RemoteServer]]:
    with serving(models["base"]) as base, serving(models["large"]) as large:
        yield {"base": base, "large": large}


@pytest.fixture(scope="module")
def host(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    model, folder = CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny"), tmp_path_factory.mktemp("host")
    with hosting(model, folder, remote_retries=0, remote_timeout=5, remote_draft=0) as opened:
        yield opened


def changed(host: Host, **settings: Any) -> Host:
    return replace(host, settings=host.settings.model_copy(update=settings))


@pytest.fixture(scope="module")
def law(host: Host, adapters: Mapping[str, Path]) -> str:
    return host.artifacts.put(adapters["law"])


@pytest.fixture
def remote(law: str) -> Callable[..., Expert]:
    """A function from a host, a server and what its card says to the expert."""

    def make(host: Host, server: RemoteServer | str, **spec: Any) -> Expert:
        url = server if isinstance(server, str) else server.url
        model = f"tiny-{next(NUMBERS)}"  # so that no other test has used up the patience with it
        return open_expert(Card("law", "law", Remote(url, model, law, 4, **spec), "tiny"), host)

    return make


def in_process(host: Host, law: str, large: Path, request: ExpertRequest, combination: Combination) -> Answer:
    card = Card("law", "law", Proxy(law, 4, str(large), combination=combination), "tiny")
    return collect(open_expert(card, host).start(request))


def answered(expert: Expert, request: ExpertRequest = ASKED) -> tuple[Answer, str | None, Paid]:
    generation = expert.start(request)
    answer = collect(generation)
    assert generation.paid is not None
    return answer, generation.mode, generation.paid


def prompt_of(host: Host, request: ExpertRequest = ASKED) -> list[int]:
    return host.chat.encode(request.messages)


SERVERS: dict[str, tuple[ExpertRequest, dict[str, Any]]] = {
    "vllm": (SEEDED, {}),
    "text is told": (ASKED, {"by_id": False}),
    "text alone": (ASKED, {"by_id": False, "token_ids": False}),
    "it begins texts": (ASKED, {"by_id": False, "token_ids": False, "begins": True}),
    "llama.cpp": (SEEDED, {"native": True, "completions": False}),
    "it knows no bias": (ASKED, {"bias": False}),
}
"""Half a character has no text, and what is drawn from tiny random weights is often that: where text is sent, greedily."""


@pytest.mark.parametrize(("request_", "abilities"), SERVERS.values(), ids=SERVERS)
def test_the_remote_path_gives_the_tokens_of_the_one_in_process(
    host: Host,
    law: str,
    large: Path,
    servers: Mapping[str, RemoteServer],
    remote: Callable[..., Expert],
    request_: ExpertRequest,
    abilities: dict[str, Any],
) -> None:
    combination = Combination(alpha=0.7)
    expected = in_process(host, law, large, request_, combination)
    with servers["large"].acting(**abilities) as server:
        answer, mode, paid = answered(remote(host, server, combination=combination), request_)
    assert answer.error is None
    assert answer.tokens == expected.tokens
    assert (answer.text, answer.reason) == (expected.text, expected.reason)
    assert mode in ("remote-full", "remote-topk")
    # by id all are told; a text may be that of several tokens, and half a character is none
    assert (mode == "remote-full") == (abilities.get("by_id", True))
    assert paid.calls - paid.completion_tokens <= 1


def test_alpha_0_gives_the_servers_own_tokens(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert]
) -> None:
    with servers["large"].acting() as server:
        answer, mode, paid = answered(remote(host, server), replace(ASKED, alpha=0.0))
        asked = server.calls()[-1]
    assert list(answer.tokens) == servers["large"].model.greedy(prompt_of(host), TOKENS)
    assert mode == "remote-full"
    assert isinstance(asked["prompt"], list)
    assert paid.calls == len(answer.tokens) + (answer.reason == "stop")


def test_alpha_1_on_the_untuned_model_gives_the_tuned_one(
    host: Host,
    servers: Mapping[str, RemoteServer],
    remote: Callable[..., Expert],
    tiny_base: Path,
    adapters: Mapping[str, Path],
) -> None:
    tuned = reference(tiny_base, adapters["law"])
    expected: list[int] = []
    for _ in range(TOKENS):
        expected.append(int(tuned([*prompt_of(host), *expected])[-1].argmax()))
    with servers["base"].acting() as server:
        answer, _, _ = answered(remote(host, server))
    assert list(answer.tokens) == expected[: len(answer.tokens)]
    assert len(answer.tokens) == TOKENS


@pytest.mark.parametrize(("way", "by_text"), [("field", False), ("echo", False), ("echo", True)])
def test_drafts_save_requests_and_change_nothing(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert], way: str, by_text: bool
) -> None:
    abilities = {"prompt": way, "token_ids": not by_text, "by_id": not by_text}
    for request in (ASKED, SEEDED):
        with servers["base"].acting(**abilities) as server:
            plain, _, singly = answered(remote(host, server), request)
            drafted, mode, paid = answered(remote(changed(host, remote_draft=8), server), request)
        assert drafted.tokens == plain.tokens
        assert drafted.text == plain.text
        assert mode
        assert mode.startswith("remote-")
        assert paid.accepted <= paid.drafted
        if request is ASKED:
            assert paid.calls < singly.calls / 2
            assert paid.accepted > TOKENS / 2


@pytest.mark.parametrize("top", [100_000, 5])
def test_drafts_are_exact_where_the_small_expert_is_often_wrong(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert], top: int
) -> None:
    """Of a drafted token the server tells the log-probability also where it is not among the likeliest: that may not count."""
    with servers["large"].acting(prompt="field", top=top) as server:
        plain, _, singly = answered(remote(host, server), replace(SEEDED, alpha=0.3))
        drafted, _, paid = answered(remote(changed(host, remote_draft=8), server), replace(SEEDED, alpha=0.3))
    assert drafted.tokens == plain.tokens
    assert paid.drafted > paid.accepted
    assert paid.calls <= singly.calls


def test_a_draft_that_takes_too_long_is_the_last(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collegium.experts.remote.drafting.PATIENCE", -1.0)
    with servers["base"].acting(prompt="field") as server:
        answer, _, paid = answered(remote(changed(host, remote_draft=8), server))
    assert answer.error is None
    assert (paid.calls, paid.drafted) == (TOKENS, 0)


def test_a_few_log_probabilities_are_near_the_whole_distribution(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert]
) -> None:
    """The error is that of the completed row; that of the answers follows from it."""
    prompt = prompt_of(host)
    whole, prior = servers["large"].model.logprobs(prompt)[-1], servers["base"].model.logits(prompt)[-1]
    errors = []
    for count in (5, 20, 100):
        row = np.full_like(whole, -np.inf)
        best = np.argsort(-whole)[:count]
        row[best] = whole[best]
        errors.append(total_variation(completed(row, prior), whole))
        with servers["large"].acting(top=count, strict=count == 20) as server:
            answer, mode, _ = answered(remote(host, server))
        assert answer.error is None
        assert mode == "remote-topk"
    assert errors == sorted(errors, reverse=True)
    assert 0 <= errors[-1] < errors[0] < 1


def test_the_end_is_found_where_a_server_hides_it(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert]
) -> None:
    """One that draws the end may tell nothing of that place, unless the end is forbidden."""
    model = servers["large"].model
    prompt = prompt_of(host)
    end = model.tokenizer.eos_token_id

    def ending(tokens: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        logits = original(tokens).copy()
        if len(tokens) >= len(prompt) + 4 and list(tokens[: len(prompt)]) == prompt:
            logits[len(prompt) + 3, end] = 100
        return logits

    original, model.logits = model.logits, ending
    try:
        for bias in (True, False):
            with servers["large"].acting(hides_end=True, bias=bias, prompt="echo") as server:
                for draft in (0, 8):
                    answer, _, _ = answered(
                        remote(changed(host, remote_draft=draft), server), replace(ASKED, alpha=0.0)
                    )
                    assert (len(answer.tokens), answer.reason, answer.error) == (4, "stop", None)
    finally:
        model.logits = original


def test_stop_strings_and_log_probabilities_work_as_for_any_expert(
    host: Host, law: str, large: Path, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert]
) -> None:
    whole = in_process(host, law, large, ASKED, Combination())
    stop = whole.text[4:6]
    request = replace(ASKED, sampling=replace(ASKED.sampling, stop=(stop,), logprobs=2))
    expected = in_process(host, law, large, request, Combination())
    with servers["large"].acting() as server:
        answer, _, _ = answered(remote(host, server), request)
    assert (answer.text, answer.tokens, answer.reason) == (expected.text, expected.tokens, "stop")
    np.testing.assert_allclose(answer.logprobs, expected.logprobs, atol=1e-3)
    assert len(answer.tops) == len(answer.tokens)


def test_what_a_server_can_do_is_asked_once_or_known_from_the_card(
    host: Host, law: str, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert]
) -> None:
    with servers["large"].acting(top=20, prompt="echo") as server:
        spec = Remote(server.url, "tiny", law, 4)
        found = find_capabilities(spec, host)
        assert (found.completions, found.chat, found.token_ids, found.by_id) == (True, True, True, True)
        assert (found.top_k, found.whole, found.prompt_logprobs, found.bias) == (20, False, "echo", True)
        server.received.clear()
        card = Card("law", "law", spec, "tiny", evidence=Evidence(capabilities=found.as_dict()))
        expert = open_expert(card, host)
        assert expert.mode == "remote-topk"
        answer, _, paid = answered(expert)
        assert answer.error is None
        assert paid.calls == len(server.received)
        other = remote(host, server)
        assert other.mode == "remote"
        answered(other)
        server.received.clear()
        _, mode, paid = answered(other)
        assert (mode, other.mode, paid.calls) == ("remote-topk", "remote-topk", len(server.received))


@pytest.mark.parametrize("abilities", [{"logprobs": False}, {"completions": False}], ids=["refused", "chat alone"])
def test_without_log_probabilities_words_are_exchanged(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert], abilities: dict[str, Any]
) -> None:
    with servers["large"].acting(**abilities) as server:
        answer, mode, paid = answered(remote(host, server))
        sent = server.calls("/v1/chat/completions")[-1]
    prompt = host.chat.encode([Message("user", sent["messages"][-1]["content"])])
    expected = servers["large"].model.greedy(prompt, TOKENS)
    assert mode == "remote-text"
    assert answer.text == "".join(servers["large"].model.texts[token] for token in expected)
    assert answer.reason == ("stop" if len(expected) < TOKENS else "length")
    assert paid == Paid(1, len(prompt), len(expected))


def test_a_server_that_stops_giving_log_probabilities_is_given_words(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert]
) -> None:
    with servers["large"].acting() as server:
        expert = remote(host, server)
        assert answered(expert)[1] == "remote-full"
        server.can.logprobs = False
        answer, mode, paid = answered(expert)
    assert (answer.error, mode, paid.calls) == (None, "remote-text", 2)


def test_a_server_that_is_starting_is_not_taken_for_one_that_cannot(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert]
) -> None:
    with servers["large"].acting(failures=[(503, {})]) as server:
        expert = remote(host, server)
        assert isinstance(answered(expert)[0].error, RemoteUnavailable)
        server.can.failures = [(500, {})]  # one question of several: it breaks on a conversation
        assert answered(expert)[1] == "remote-full"


def test_the_mode_text_carries_knowledge_and_demonstrations(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert], tmp_path: Path, tiny_base: Path
) -> None:
    rows = [("explain the fever", "hot"), ("explain the contract of sale", "a deal"), ("what is a loop", "round")]
    store(rows, tmp_path)
    version = host.artifacts.put(tmp_path)
    history = (Message("user", "hello"), Message("assistant", "hi"), *ASKED.messages)
    sampling = Sampling(max_tokens=5, temperature=0.5, top_p=0.5, stop=("\n\n",), presence_penalty=0.25)
    request = replace(ASKED, messages=history, sampling=sampling, seed=3)
    with servers["large"].acting() as server:
        expert = remote(host, server, mode="text", demonstrations=version)
        assert expert.mode == "remote-text"
        answer, mode, _ = answered(expert, request)
        sent = server.calls("/v1/chat/completions")
    assert (answer.error, mode, len(sent)) == (None, "remote-text", 1)
    turns = [(one["role"], one["content"]) for one in sent[0]["messages"]]
    assert turns[:4] == [("user", rows[0][0]), ("assistant", "hot"), ("user", rows[1][0]), ("assistant", "a deal")]
    assert turns[4:6] == [("user", "hello"), ("assistant", "hi")]
    last = turns[6][1]
    assert last.endswith(f"\n\n{QUESTION}")
    assert "may be wrong" in last.splitlines()[0]
    assert all(line.startswith("> ") for line in last.removesuffix(f"\n\n{QUESTION}").splitlines()[1:])
    wanted = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.5, "stop": ["\n\n"], "presence_penalty": 0.25, "seed": 3}
    assert {name: sent[0][name] for name in wanted} == wanted


@pytest.mark.parametrize("mode", ["auto", "text"])
@pytest.mark.parametrize("failure", ["expert", "partial"])
def test_a_server_that_dies_in_mid_answer_ends_as_the_settings_say(
    host: Host,
    servers: Mapping[str, RemoteServer],
    remote: Callable[..., Expert],
    tiny_base: Path,
    adapters: Mapping[str, Path],
    mode: str,
    failure: str,
) -> None:
    with servers["large"].acting() as server:
        expert = remote(changed(host, remote_failure=failure), server, mode=mode)
        whole, name, _ = answered(expert)
        server.can.dies_after = 5
        answer, found, paid = answered(expert)
    assert answer.error is None
    assert answer.text.startswith(whole.text[:3])
    assert found == f"{name}+{failure}"
    assert paid.calls >= 1
    if mode == "auto":
        assert answer.tokens[:5] == whole.tokens[:5]
    if failure == "partial":
        assert answer.reason == "length"
        assert len(answer.tokens) < len(whole.tokens)
    else:
        tuned = reference(tiny_base, adapters["law"])
        rest = list(answer.tokens[:5])
        while mode == "auto" and len(rest) < len(answer.tokens):
            rest.append(int(tuned([*prompt_of(host), *rest])[-1].argmax()))
        assert mode == "text" or list(answer.tokens) == rest
        assert len(answer.tokens) >= 6


def test_a_budget_ends_an_answer_as_a_failure_does(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert]
) -> None:
    with servers["large"].acting() as server:
        expert = remote(changed(host, remote_calls=4, remote_failure="partial"), server)
        answer, mode, paid = answered(expert)
    assert (len(answer.tokens), mode, paid.calls) == (4, "remote-full+partial", 4)


def test_what_may_pass_is_tried_again(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert]
) -> None:
    with servers["large"].acting() as server:
        expert = remote(changed(host, remote_retries=2), server)
        expected, _, plain = answered(expert)
        server.can.failures = [(429, {"retry-after": "0.01"}), (503, {"retry-after": "0"})]
        answer, _, paid = answered(expert)
        server.can.failures = [(429, {"retry-after": "3600"})]
        before = time.monotonic()
        refused, _, _ = answered(expert)
    assert answer.tokens == expected.tokens
    assert paid.calls == plain.calls + 2
    assert isinstance(refused.error, RemoteUnavailable)
    assert time.monotonic() - before < 5


def test_a_server_that_is_down_is_left_alone_for_a_while(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert]
) -> None:
    with servers["large"].acting() as server:
        expert = remote(host, server)
        answered(expert)
        server.can.failures = [(500, {})] * 5
        for _ in range(5):
            answer, _, _ = answered(expert)
            assert isinstance(answer.error, RemoteUnavailable)
            assert "500" in str(answer.error)
        server.received.clear()
        answer, _, _ = answered(expert)
        assert isinstance(answer.error, RemoteUnavailable)
        assert "tried again in" in str(answer.error)
        assert not server.received


def test_a_server_that_is_not_there_is_an_error_with_a_hint(host: Host, remote: Callable[..., Expert]) -> None:
    answer, _, _ = answered(remote(host, "http://127.0.0.1:9/v1"))
    assert isinstance(answer.error, RemoteUnavailable)
    assert answer.error.retryable
    assert "cannot be reached" in str(answer.error)


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("https://api.example.com/v1", "remote_hosts"),
        ("ftp://127.0.0.1/v1", "http://"),
        ("http://me:secret@127.0.0.1/v1", "key_env"),
        ("http://127.0.0.1/v1?key=secret", "http://"),
        ("http:me:secret@127.0.0.1/v1", "http://"),
        ("http://[::1/v1", "cannot be read"),
        ("http://me:secret@127.0.0.1:secret/v1", "cannot be read"),
        ("http://127.0.0.1:99999/v1", "cannot be read"),
        ("http://127.0.0.1\n/v1", "cannot be read"),
    ],
)
def test_other_hosts_and_addresses_are_refused(host: Host, remote: Callable[..., Expert], url: str, names: str) -> None:
    with pytest.raises(InvalidRequest, match=names) as raised:
        remote(host, url)
    assert "secret" not in str(raised.value)


def test_redirects_are_not_followed(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert]
) -> None:
    with servers["base"].acting() as elsewhere, servers["large"].acting() as server:
        expert = remote(host, server)
        answered(expert)
        server.can.moved = f"{elsewhere.url}/completions"
        answer, _, _ = answered(expert)
        assert isinstance(answer.error, RemoteUnavailable)
        assert not elsewhere.received


def test_a_key_goes_to_the_server_and_nowhere_else(
    host: Host,
    servers: Mapping[str, RemoteServer],
    remote: Callable[..., Expert],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    with servers["large"].acting() as server:
        expert = remote(host, server, key_env="TINY_KEY")
        answer, _, _ = answered(expert)
        assert isinstance(answer.error, RemoteUnavailable)
        assert "TINY_KEY" in str(answer.error)
        monkeypatch.setenv("TINY_KEY", "sesame-4711")
        assert answered(expert)[0].error is None
        assert all(one.headers["authorization"] == "Bearer sesame-4711" for one in server.received)
        server.can.failures = [(401, {})]
        answer, _, _ = answered(expert)
        assert "key_env" in str(answer.error)
        assert "***" in str(answer.error)
        monkeypatch.setenv("TINY_KEY", "sesame-4711\n")
        assert answered(expert)[0].error is None
        for key in ("sesame\n4711", "sesame-é"):
            monkeypatch.setenv("TINY_KEY", key)
            answer, _, _ = answered(expert)
            assert "TINY_KEY" in str(answer.error)
    assert "sesame" not in f"{answer.error!r} {answer.error} {vars(expert)!r} {caplog.text}"


@pytest.mark.parametrize(
    ("choice", "mode"),
    [
        ({"text": "a", "logprobs": [1]}, "remote-text"),
        ({"text": "a", "logprobs": {"top_logprobs": 5}}, "remote-text"),
        (None, "remote-text"),
        ({"text": "a", "logprobs": {"top_logprobs": [{"a": "likely"}]}}, None),
    ],
)
def test_replies_of_another_shape_are_no_bug_of_ours(
    host: Host,
    servers: Mapping[str, RemoteServer],
    remote: Callable[..., Expert],
    choice: Any,
    mode: str | None,
) -> None:
    with servers["large"].acting() as server:
        server.can.odd = {"choices": [choice], "usage": "much"}
        expert = remote(host, server)
        answer, found, _ = answered(expert)
        if mode:
            assert (answer.error, found) == (None, mode)
        else:
            assert isinstance(answer.error, RemoteUnavailable)
            assert "cannot be read" in str(answer.error)
        server.can.odd = {}
        known = remote(changed(host, remote_failure="expert"), server)
        answered(known)
        server.can.odd = {"choices": [choice], "usage": "much"}
        assert isinstance(answered(known)[0].error, RemoteUnavailable if mode is None else type(None))


class Stranger(Model):
    """A model that cuts text elsewhere."""

    def encode(self, text: str) -> list[int]:
        return [token for token in super().encode(text) for _ in "ab"]


def test_another_vocabulary_is_refused_and_the_way_out_is_named(
    host: Host, large: Path, remote: Callable[..., Expert]
) -> None:
    with serving(Stranger(large)) as stranger:
        for token_ids in (True, False):
            with stranger.acting(token_ids=token_ids, chat=False) as server:
                answer, _, _ = answered(remote(host, server))
            assert isinstance(answer.error, UnsupportedModel)
            assert "--mode text" in str(answer.error)


def test_who_goes_away_costs_no_more_requests(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert]
) -> None:
    request = replace(ASKED, sampling=Sampling(max_tokens=100))
    with servers["large"].acting() as server:
        for mode in ("auto", "text"):
            expert = remote(host, server, mode=mode)
            answered(expert)
            server.can.delay = 0.02
            server.received.clear()
            generation = expert.start(request)
            until(lambda: len(server.received) > 0)
            generation.close()
            answer = collect(generation)
            asked = len(server.received)
            time.sleep(0.1)
            assert (answer.reason, len(server.received)) == ("cancelled", asked)
            assert generation.mode
            server.can.delay = 0
        early = expert.start(request)
        early.close()
        assert collect(early).reason == "cancelled"
        until(lambda: host.engine.stats().running == 0)


def test_a_deadline_ends_an_answer(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert]
) -> None:
    with servers["large"].acting(delay=0.5) as server:
        for mode in ("auto", "text"):
            before = time.monotonic()
            answer, _, _ = answered(remote(host, server, mode=mode), replace(ASKED, deadline=before + 0.1))
            assert answer.reason == "cancelled"
            assert time.monotonic() - before < 0.4


def test_a_slow_server_keeps_nobody_waiting(
    host: Host, servers: Mapping[str, RemoteServer], remote: Callable[..., Expert]
) -> None:
    with servers["large"].acting() as server:
        expert = remote(host, server)
        expected, _, _ = answered(expert)
        server.can.delay = 0.1
        running = [expert.start(ASKED) for _ in range(12)]  # more rows than there are
        until(lambda: server.active > 1)
        before = time.monotonic()
        local = collect(open_expert(Card("base", "", Base(), "tiny"), host).start(ASKED))
        assert time.monotonic() - before < 0.1 * TOKENS / 2
        assert len(local.tokens) > 0
        server.can.delay = 0
        assert [collect(one).tokens for one in running] == [expected.tokens] * 12
        assert server.most_active > 1
