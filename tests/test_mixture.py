from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from collegium.errors import ContextTooLong, InvalidRequest
from collegium.experts.engine.generation import Generation
from collegium.experts.engine.mixing import SHARE
from collegium.experts.engine.slots import Adapter
from collegium.experts.kinds import Expert, Host, LocalExpert
from collegium.experts.mixture import mixture
from collegium.models.cache import CachedModel
from collegium.schema import ExpertRequest, Message, Sampling
from collegium.tests.engine_doubles import MARGIN, collect
from collegium.tests.engine_models import hosting, reference

TOKENS = 8
ASKED = ExpertRequest((Message("user", "explain the contract"),), "x", sampling=Sampling(max_tokens=TOKENS, logprobs=1))
SYSTEMS = {"law": "You know the law.", "code": None}


@pytest.fixture(scope="module")
def host(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    model = CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny")
    with hosting(model, tmp_path_factory.mktemp("host"), max_rows=3) as opened:
        yield opened


@pytest.fixture(scope="module")
def experts(host: Host, adapters: Mapping[str, Path]) -> dict[str, LocalExpert]:
    """Two with adapters, each under a system prompt of its own or none."""
    return {name: LocalExpert(host, SYSTEMS[name], Adapter(name, folder), "lora") for name, folder in adapters.items()}


def by_hand(
    experts: Mapping[str, LocalExpert], weights: Mapping[str, float], base: Path, adapters: Mapping[str, Path]
) -> tuple[list[int], list[float]]:
    """Greedy tokens of the posterior mean of what transformers and PEFT expect, and their log-probabilities."""
    logits = {name: reference(base, adapters[name]) for name in weights}
    tokens: list[int] = []
    logprobs: list[float] = []
    now = dict(weights)
    for _ in range(TOKENS):
        raised = {
            name: np.exp(logits[name]([*experts[name].row(ASKED).prompt, *tokens])[-1].astype(np.float64))
            for name in now
        }
        told = {name: one / one.sum() for name, one in raised.items()}
        mean = np.sum([now[name] * told[name] for name in now], axis=0)
        second, first = np.sort(np.log(mean))[-2:]
        assert first - second > MARGIN, "take another prompt"
        tokens.append(int(mean.argmax()))
        logprobs.append(float(first))
        posterior = {name: now[name] * told[name][tokens[-1]] / mean[tokens[-1]] for name in now}
        now = {name: (1 - SHARE) * posterior[name] + SHARE * weights[name] for name in now}
    return tokens, logprobs


def test_a_mixture_is_the_posterior_mean_of_its_experts(
    host: Host, experts: Mapping[str, LocalExpert], tiny_base: Path, adapters: Mapping[str, Path]
) -> None:
    weights = {"law": 0.5, "code": 0.5}
    both = mixture([(experts[name], weight) for name, weight in weights.items()], host)
    answer = collect(both.start(ASKED))
    tokens, logprobs = by_hand(experts, weights, tiny_base, adapters)
    assert list(answer.tokens) == tokens
    assert answer.logprobs == pytest.approx(logprobs, abs=1e-3)
    assert both.mode == "mixture"
    assert collect(both.start(ASKED)) == answer  # each answer begins with the prior


def test_an_expert_with_all_the_weight_answers_alone(host: Host, experts: Mapping[str, LocalExpert]) -> None:
    law, code = experts["law"], experts["code"]
    alone = {name: collect(expert.start(ASKED)).tokens for name, expert in experts.items()}
    assert alone["law"] != alone["code"]
    assert collect(mixture([(law, 1.0), (code, 0.0)], host).start(ASKED)).tokens == alone["law"]
    assert collect(mixture([(law, 0.0), (code, 1.0)], host).start(ASKED)).tokens == alone["code"]
    assert collect(mixture([(law, 1.0)], host).start(ASKED)).tokens == alone["law"]


def test_each_reads_the_prompt_under_its_own_system_prompt(host: Host, experts: Mapping[str, LocalExpert]) -> None:
    shared = replace(ASKED, messages=(Message("system", "Be brief."), *ASKED.messages))
    assert experts["law"].row(ASKED).prompt != experts["code"].row(ASKED).prompt
    assert experts["law"].row(shared).prompt == experts["code"].row(shared).prompt
    both = mixture([(experts["law"], 0.5), (experts["code"], 0.5)], host).start(ASKED)
    assert both.prompt_tokens == len(experts["law"].row(ASKED).prompt)  # the first one's
    both.close()


def test_it_draws_as_the_request_says(host: Host, experts: Mapping[str, LocalExpert]) -> None:
    both = mixture([(experts["law"], 0.6), (experts["code"], 0.4)], host)
    hot = replace(ASKED, sampling=replace(ASKED.sampling, temperature=1.5), seed=3)
    first, second = collect(both.start(hot)), collect(both.start(hot))
    assert first.tokens == second.tokens
    assert first.logprobs == pytest.approx(
        second.logprobs, abs=1e-5
    )  # where rows lie in memory tells in the last digit
    assert first.tokens != collect(both.start(replace(hot, seed=4))).tokens
    late = collect(both.start(replace(ASKED, deadline=0.0)))
    assert (late.reason, late.tokens) == ("cancelled", ())


def test_a_prompt_that_fits_none_is_refused(host: Host, experts: Mapping[str, LocalExpert]) -> None:
    both = mixture([(experts["law"], 0.5), (experts["code"], 0.5)], host)
    with pytest.raises(ContextTooLong):
        both.start(replace(ASKED, messages=(Message("user", "x " * 500),)))


@dataclass(frozen=True)
class Elsewhere:
    """An expert that another process computes."""

    mode: str = "remote"

    def start(self, request: ExpertRequest) -> Generation:
        """Never."""
        raise NotImplementedError


def test_what_cannot_be_mixed_is_refused(host: Host, experts: Mapping[str, LocalExpert]) -> None:
    law: Expert = experts["law"]
    with pytest.raises(InvalidRequest, match="mode 'remote' cannot be mixed"):
        mixture([(law, 0.5), (Elsewhere(), 0.5)], host)
    with pytest.raises(InvalidRequest, match="sum to 1"):
        mixture([(law, 0.5), (law, 0.4)], host)
    with pytest.raises(InvalidRequest, match="4 rows, 3 run at once"):
        mixture([(law, 0.25)] * 4, host).start(ASKED)
