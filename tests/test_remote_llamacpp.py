"""llama-cpp-python's server on loopback: what it is found to do, and its tokens beside those computed here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from collegium.errors import ModelUnavailable
from collegium.experts.kinds import open_expert
from collegium.experts.remote.expert import find_capabilities
from collegium.models.cache import CachedModel, ModelCache
from collegium.models.fetch import fetch
from collegium.models.names import parse_name
from collegium.schema import Card, Evidence, ExpertRequest, Message, Proxy, Remote, Sampling
from collegium.settings import DEFAULT_BASE
from collegium.tests.engine_doubles import collect
from collegium.tests.engine_models import hosting, reference
from collegium.tests.test_models_convert import tiny_gguf  # noqa: F401

pytestmark = pytest.mark.slow
PYTHON = os.environ.get("COLLEGIUM_LLAMACPP_PYTHON", sys.executable)  # before the tests' environment is cleared
TOKENS = 12
AGREE = 0.75
"""Share of greedy tokens, each after the same text, that 4-bit weights times 8-bit activations and float32 have in common."""
QUESTIONS = ("What is the capital of France?", "Why is the sky blue?")


@contextmanager
def llama_server(gguf: Path) -> Iterator[str]:
    """The server's address. Skips the test where the interpreter has none."""
    if subprocess.run([PYTHON, "-c", "import llama_cpp.server.app"], capture_output=True, check=False).returncode:
        pytest.skip(f"{PYTHON} has no llama-cpp-python with its server; COLLEGIUM_LLAMACPP_PYTHON names one that has")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"model": gguf, "logits_all": "true", "n_ctx": 512, "host": "127.0.0.1", "port": port, "n_threads": 1}
    command = [PYTHON, "-m", "llama_cpp.server"]
    for name, value in {**options, "verbose": "false"}.items():
        command += [f"--{name}", str(value)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}/v1"
            for _ in range(300):
                try:
                    httpx.get(f"{url}/models")
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()


def test_a_tiny_float32_model_gives_the_tokens_of_the_proxy_in_process(
    tiny_gguf: Path,  # noqa: F811
    tiny_base: Path,
    adapters: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    model = CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny")
    with hosting(model, tmp_path, kv_cache_mb=64, remote_draft=0) as host, llama_server(tiny_gguf) as url:
        law = host.artifacts.put(adapters["law"])
        spec = Remote(url, "tiny", law, 4)
        found = find_capabilities(spec, host)
        assert (found.completions, found.chat, found.token_ids, found.bias) == (True, True, False, True)
        assert (found.prompt_logprobs, found.whole) == ("echo", False)
        assert found.top_k > 100
        request = ExpertRequest((Message("user", "explain the contract"),), "x", sampling=Sampling(max_tokens=TOKENS))
        evidence = Evidence(capabilities=found.as_dict())
        expected = collect(open_expert(Card("law", "law", Proxy(law, 4), "tiny"), host).start(request))
        for draft in (0, 8):
            drafting = replace(host, settings=host.settings.model_copy(update={"remote_draft": draft}))
            generation = open_expert(Card("law", "law", spec, "tiny", evidence=evidence), drafting).start(request)
            answer = collect(generation, patience=60)
            assert (answer.error, generation.mode) == (None, "remote-topk")
            assert answer.tokens == expected.tokens
            assert generation.paid
            assert generation.paid.calls == TOKENS if not draft else generation.paid.calls < TOKENS / 2


@pytest.mark.models
def test_the_default_model_mostly_agrees(real_home: Path, tmp_path: Path) -> None:
    model = ModelCache(real_home / "models").get(DEFAULT_BASE)
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    try:
        fetch(parse_name(DEFAULT_BASE), gguf, timeout=60)
    except ModelUnavailable as error:
        pytest.skip(str(error))
    shipped = Path(__file__).parent.parent / "shipped" / "artifacts"
    folder = sorted(path.parent for path in shipped.glob("*/adapter_model.safetensors"))[0]
    logits = reference(model.folder)
    with (
        hosting(model, tmp_path, kv_cache_mb=64, remote_draft=0) as host,
        llama_server(next(gguf.glob("*.gguf"))) as url,
    ):
        spec = Remote(url, "smollm2", host.artifacts.put(folder), 16)
        found = find_capabilities(spec, host)
        assert (found.completions, found.token_ids, found.begins) == (True, False, False)
        assert found.top_k >= 900
        card = Card("law", "law", spec, model.identity, evidence=Evidence(capabilities=found.as_dict()))
        same = 0
        for question in QUESTIONS:
            messages = (Message("user", question),)
            request = ExpertRequest(messages, "x", sampling=Sampling(max_tokens=TOKENS), alpha=0.0)
            answer = collect(open_expert(card, host).start(request), patience=60)
            assert answer.error is None
            prompt = host.chat.encode(messages)
            rows = logits([*prompt, *answer.tokens])[len(prompt) - 1 : -1]
            same += sum(int(row.argmax()) == token for row, token in zip(rows, answer.tokens, strict=True))
    assert same >= AGREE * TOKENS * len(QUESTIONS)
