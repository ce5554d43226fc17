"""What a request may ask for beside one row: formulas over rows, remote rows, grammars, scores, reuse; and who is refused."""

from __future__ import annotations

import gc
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from collegium.errors import CollegiumError, ContextTooLong, InvalidRequest, ModelUnavailable
from collegium.experts.engine.batch import Floats
from collegium.experts.engine.combine import Combiner, Identity
from collegium.experts.engine.engine import Engine
from collegium.experts.engine.lora import LoraWeights
from collegium.experts.engine.mixing import ProbabilityMixture
from collegium.experts.engine.model import share
from collegium.experts.engine.pace import Pace
from collegium.experts.engine.request import Request, Row
from collegium.experts.engine.sampling import one_of
from collegium.experts.engine.slots import Adapter
from collegium.experts.engine.steering import LogitArithmetic
from collegium.models.cache import CachedModel
from collegium.models.load import load_tokenizer
from collegium.schema import Sampling
from collegium.tests.engine_doubles import (
    MARGIN,
    PRECISIONS,
    Doubled,
    Promised,
    Remote,
    assert_agrees,
    collect,
    is_idle,
    no_thread_is_left,
    open_decoder,
    until,
)
from collegium.tests.engine_models import TOKENS, VOCAB, reference, tiny_lm, tiny_lora

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from collegium.tests.engine_doubles import Precision

Logits = Callable[[Sequence[int]], Floats]
SHORT = Sampling(max_tokens=12)
ONE = Sampling(max_tokens=1)
END = 2


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models, and two adapters of the smaller one."""
    root = tmp_path_factory.mktemp("models")
    base = tiny_lm(root / "base", hidden_size=48, seed=5)
    small = tiny_lm(root / "small", seed=6)
    tuned = {name: tiny_lora(root / name, small, seed=seed) for seed, name in enumerate(("law", "code"), 7)}
    return {"base": base, "small": small, **tuned}


@pytest.fixture(scope="module")
def by_transformers(folders: Mapping[str, Path]) -> dict[str, Logits]:
    """A function from tokens to logits for each model and adapter."""
    plain = {name: reference(folders[name]) for name in ("base", "small")}
    return plain | {name: reference(folders["small"], folders[name]) for name in ("law", "code")}


@pytest.fixture
def law(folders: Mapping[str, Path]) -> Adapter:
    return Adapter("law", folders["law"])


@pytest.fixture
def code(folders: Mapping[str, Path]) -> Adapter:
    return Adapter("code", folders["code"])


@pytest.fixture(scope="module")
def decoders(folders: Mapping[str, Path]) -> dict[str, Doubled]:
    """A model `base` and a smaller one, which outlive engines."""
    return {name: Doubled(open_decoder(folders[name], pages=80)) for name in ("base", "small")}


@pytest.fixture
def make_engine(decoders: Mapping[str, Doubled], tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., Engine]]:
    opened: list[Engine] = []

    def make(**options: Any) -> Engine:
        opened.append(Engine(decoders, tokenizer, **options))
        return opened[-1]

    with no_thread_is_left():
        yield make
        for decoder in decoders.values():
            decoder.let_go()
        for engine in opened:
            engine.close()
    for decoder in decoders.values():
        decoder.reset()


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()


def by_hand(formula: Callable[[list[Any]], Any], rows: Sequence[tuple[Logits, Sequence[int]]], count: int) -> list[int]:
    """Greedy tokens of what `formula` makes of the rows' logits in double precision; the margin rule must never be needed."""
    generated: list[int] = []
    for _ in range(count):
        logits = [logits_of([*prompt, *generated])[-1].astype(np.float64) for logits_of, prompt in rows]
        combined = formula(logits)
        second, first = np.sort(combined)[-2:]
        assert first - second > MARGIN, "take another seed"
        generated.append(int(combined.argmax()))
    return generated


def softmax(logits: Any) -> Any:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_logit_arithmetic_is_the_formula(
    engine: Engine, by_transformers: Mapping[str, Logits], law: Adapter, alpha: float
) -> None:
    prompts = TOKENS[:20], TOKENS[5:30], TOKENS[5:30]
    rows = Row(prompts[0]), Row(prompts[1], law, "small"), Row(prompts[2], None, "small")
    expected = by_hand(
        lambda z: z[0] + alpha * (z[1] - z[2]),
        list(zip((by_transformers[name] for name in ("base", "law", "small")), prompts, strict=True)),
        12,
    )
    answer = collect(engine.submit(Request(rows, LogitArithmetic(alpha), SHORT)))
    assert list(answer.tokens) == expected[: len(answer.tokens)]
    assert (len(answer.tokens), answer.reason) == (12, "length")


def test_a_mixture_is_the_formula(
    engine: Engine, by_transformers: Mapping[str, Logits], law: Adapter, code: Adapter
) -> None:
    weights = 0.2, 0.5, 0.3
    rows = Row(TOKENS[:9]), Row(TOKENS[3:21], law, "small"), Row(TOKENS[3:21], code, "small")
    expected = by_hand(
        lambda z: np.log(sum(weight * softmax(one) for weight, one in zip(weights, z, strict=True))),
        [(by_transformers[name], row.prompt) for name, row in zip(("base", "law", "code"), rows, strict=True)],
        12,
    )
    sampling = replace(SHORT, logprobs=3)
    answer = collect(engine.submit(Request(rows, ProbabilityMixture(weights), sampling)))
    assert list(answer.tokens) == expected
    logits = [by_transformers[name](row.prompt)[-1] for name, row in zip(("base", "law", "code"), rows, strict=True)]
    first = np.log(sum(weight * softmax(one) for weight, one in zip(weights, logits, strict=True)))
    assert answer.logprobs[0] == pytest.approx(float(first[answer.tokens[0]]), abs=1e-4)
    assert [one for one, _ in answer.tops[0]] == np.argsort(-first)[:3].tolist()


def test_rows_of_several_models_and_requests_side_by_side(
    engine: Engine, by_transformers: Mapping[str, Logits], law: Adapter, code: Adapter
) -> None:
    asked = {
        "base": Request((Row(TOKENS[:7]),), sampling=SHORT),
        "small": Request((Row(TOKENS[:11], None, "small"),), sampling=SHORT),
        "law": Request((Row(TOKENS[2:30], law, "small"),), sampling=SHORT),
        "code": Request((Row(TOKENS[2:30], code, "small"),), sampling=SHORT),
    }
    running = {name: engine.submit(request) for name, request in asked.items()}
    for name, generation in running.items():
        prompt = asked[name].local[0].prompt
        expected = by_hand(lambda z: z[0], [(by_transformers[name], prompt)], 12)
        assert_agrees(collect(generation).tokens, expected, prompt, by_transformers[name])


def test_a_forced_answer_is_scored(engine: Engine, by_transformers: Mapping[str, Logits], law: Adapter) -> None:
    answer = (*TOKENS[20:], END, END, 5)  # nothing ends it: no end token, no stop string, no grammar
    everything = Sampling(max_tokens=2, stop=("a", "e", "i"), repetition_penalty=1.5)
    request = Request((Row(TOKENS[:20], law, "small"),), Identity(), everything, (lambda z, _: z.fill(-np.inf),))
    found = collect(engine.submit(replace(request, forced=answer)))
    assert (found.tokens, found.reason) == (answer, "length")
    logits = by_transformers["law"]([*TOKENS[:20], *answer])[19:-1]
    expected = [
        float(np.log(softmax(row.astype(np.float64)))[token]) for row, token in zip(logits, answer, strict=True)
    ]
    assert found.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_forced_answer_is_scored_by_a_mixture(engine: Engine, by_transformers: Mapping[str, Logits]) -> None:
    rows = Row(TOKENS[:9]), Row(TOKENS[:9], None, "small")
    request = Request(rows, ProbabilityMixture((0.25, 0.75)), forced=(3, 4, 5))
    expected = []
    for at, token in enumerate((3, 4, 5)):
        big, small = (by_transformers[one]([*TOKENS[:9], 3, 4, 5][: 9 + at])[-1] for one in ("base", "small"))
        expected.append(math.log(0.25 * softmax(big)[token] + 0.75 * softmax(small)[token]))
    assert collect(engine.submit(request)).logprobs == pytest.approx(expected, abs=1e-4)


def test_a_grammar_decides_what_may_be_said(engine: Engine, by_transformers: Mapping[str, Logits]) -> None:
    choices = [[7, 8, 9], [7, 10], [11]]
    request = Request((Row(TOKENS[:9]),), sampling=replace(SHORT, logprobs=1), masks=(one_of(choices, END),))
    answer = collect(engine.submit(request))
    assert list(answer.tokens) in choices
    assert answer.reason == "stop"
    logits = by_transformers["base"](TOKENS[:9])[-1]
    assert answer.tokens[0] == (7 if logits[7] > logits[11] else 11)
    assert answer.logprobs[0] == pytest.approx(float(np.log(softmax(logits))[answer.tokens[0]]), abs=1e-4)
    assert answer.tops[0][0][0] == logits.argmax(), "log-probabilities are the model's own"


def test_log_probabilities_come_with_each_token(engine: Engine, by_transformers: Mapping[str, Logits]) -> None:
    answer = collect(engine.generate(TOKENS[:9], sampling=replace(SHORT, logprobs=4, presence_penalty=1.5)))
    logits = by_transformers["base"]([*TOKENS[:9], *answer.tokens])[8:-1]
    for row, token, logprob, top in zip(logits, answer.tokens, answer.logprobs, answer.tops, strict=True):
        wanted = np.log(softmax(row))
        assert logprob == pytest.approx(float(wanted[token]), abs=1e-4)
        assert [one for one, _ in top] == np.argsort(-row)[:4].tolist()
        assert [value for _, value in top] == pytest.approx([wanted[one] for one, _ in top], abs=1e-4)
    plain = collect(engine.generate(TOKENS[:9], sampling=SHORT))
    assert (plain.logprobs, plain.tops) == ((), ())


@pytest.mark.parametrize("cost", ["presence_penalty", "frequency_penalty"])
def test_penalties_reach_the_answer(engine: Engine, by_transformers: Mapping[str, Logits], cost: str) -> None:
    logits = by_transformers["base"]
    generated: list[int] = []
    for _ in range(12):
        row = logits([*TOKENS[:9], *generated])[-1].copy()
        for token in set(generated):
            row[token] -= 2.0 * (generated.count(token) if cost == "frequency_penalty" else 1)
        generated.append(int(row.argmax()))
    penalty: dict[str, Any] = {cost: 2.0}
    assert list(collect(engine.generate(TOKENS[:9], sampling=replace(SHORT, **penalty))).tokens) == generated


def test_min_p_and_min_tokens_reach_the_answer(engine: Engine) -> None:
    greedy = collect(engine.generate(TOKENS[:9], sampling=SHORT)).tokens
    hot = replace(SHORT, temperature=5.0)
    assert collect(engine.generate(TOKENS[:9], sampling=replace(hot, min_p=1.0), seed=1)).tokens == greedy
    assert collect(engine.generate(TOKENS[:9], sampling=hot, seed=1)).tokens != greedy
    only_end = (lambda logits, _: logits[END + 1 :].fill(-9),)
    request = Request((Row(TOKENS[:9]),), masks=only_end, sampling=replace(SHORT, min_tokens=5, temperature=0.0))
    found = collect(engine.submit(request))
    assert len(found.tokens) == 12 or (found.reason == "stop" and len(found.tokens) >= 5)


def test_vocabularies_may_be_padded_to_different_sizes(
    folders: Mapping[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    wide = tiny_lm(tmp_path / "wide", vocab_size=VOCAB + 15, seed=9)
    models = {"base": open_decoder(wide, "float32"), "small": open_decoder(folders["small"], "float32")}
    engine = Engine(models, tokenizer)
    rows = Row(TOKENS[:9]), Row(TOKENS[:9], None, "small"), Row(TOKENS[:9], None, "small")
    first, second = (reference(folder)(TOKENS[:9])[-1][:VOCAB] for folder in (wide, folders["small"]))
    answer = collect(engine.submit(Request(rows, LogitArithmetic(1.0), ONE)))
    assert answer.tokens == (int(first.argmax()),)
    mixed = collect(engine.submit(Request(rows[:2], ProbabilityMixture((0.5, 0.5)), ONE)))
    raised = [np.exp(one - one.max()) for one in (first, second)]
    assert mixed.tokens == (int(sum(one / one.sum() for one in raised).argmax()),)
    engine.close()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_remote_row_gives_what_a_local_one_gives(
    folders: Mapping[str, Path], law: Adapter, tokenizer: PreTrainedTokenizerFast, precision: Precision
) -> None:
    """The remote row is computed by another engine, a token at a time."""
    opened = [
        Engine({name: open_decoder(folders[name], precision) for name in ("base", "small")}, tokenizer)
        for _ in range(2)
    ]

    class Elsewhere:
        def __init__(self, row: Row) -> None:
            self.row = row

        def logits(self, generated: Sequence[int]) -> Future[Floats]:
            future: Future[Floats] = Future()

            class Catch(Identity):
                def __call__(self, logits: Sequence[Floats], generated: Sequence[int] = ()) -> Floats:
                    future.set_result(logits[0].copy())
                    return logits[0]

            row = replace(self.row, prompt=[*self.row.prompt, *generated])
            opened[1].submit(Request((row,), Catch(), ONE))
            return future

    rows = Row(TOKENS[:20]), Row(TOKENS[:25], law, "small"), Row(TOKENS[:25], None, "small")
    sampling = replace(SHORT, temperature=0.8, logprobs=0)
    local = collect(opened[0].submit(Request(rows, LogitArithmetic(1.5), sampling, seed=3)))
    for places in ((1,), (2,), (0, 1)):
        mixed = tuple(Elsewhere(row) if at in places else row for at, row in enumerate(rows))
        found = collect(opened[0].submit(Request(mixed, LogitArithmetic(1.5), sampling, seed=3)))
        assert found.tokens == local.tokens
        if precision == "int8":
            assert found.logprobs == local.logprobs
        else:
            assert found.logprobs == pytest.approx(local.logprobs, abs=1e-4)
    for engine in opened:
        engine.close()


def test_a_slow_remote_row_stalls_nobody_else(engine: Engine, by_transformers: Mapping[str, Logits]) -> None:
    with ThreadPoolExecutor(2) as pool:
        slow = Remote(TOKENS[:9], by_transformers["small"], pool, delay=0.2)
        leaning = engine.submit(
            Request((Row(TOKENS[:9]), slow), ProbabilityMixture((0.5, 0.5)), replace(SHORT, max_tokens=3))
        )
        started = time.monotonic()
        for _ in range(5):
            assert collect(engine.generate(TOKENS[:9], sampling=SHORT)).reason == "length"
        assert len(slow.asked) < 3 or time.monotonic() - started > 0.6
        answer = collect(leaning)
        assert (len(answer.tokens), answer.reason) == (3, "length")
        assert slow.asked == [answer.tokens[:at] for at in range(3)], "what follows the last token is not asked for"
    local = Request((Row(TOKENS[:9]), Row(TOKENS[:9], None, "small")), ProbabilityMixture((0.5, 0.5)), SHORT)
    assert collect(engine.submit(local)).tokens[:3] == answer.tokens


def test_an_engine_whose_rows_all_wait_sleeps(
    make_engine: Callable[..., Engine], decoders: Mapping[str, Doubled]
) -> None:
    engine, row = make_engine(max_rows=2), Promised()
    leaning = engine.submit(
        Request((Row(TOKENS[:9]), row), ProbabilityMixture((0.5, 0.5)), SHORT, deadline=time.monotonic() + 60)
    )
    waiting = engine.generate(TOKENS[:9], sampling=ONE)
    until(lambda: engine.stats().running == 1 and len(decoders["base"].passes) == 1)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before < 0.1
    row.futures[0].set_result(np.zeros(VOCAB, np.float32))
    until(lambda: len(row.futures) == 2)
    waiting.close()
    assert collect(waiting).reason == "cancelled"
    leaning.close()
    assert collect(leaning).reason == "cancelled"
    assert row.futures[1].cancelled()
    assert is_idle(engine)


def test_a_deadline_is_kept_where_nothing_else_happens(engine: Engine) -> None:
    rows, started = (Row(TOKENS[:9]), Promised()), time.monotonic()
    request = Request(rows, ProbabilityMixture((0.5, 0.5)), SHORT, deadline=started + 0.1)
    assert collect(engine.submit(request)).reason == "cancelled"
    assert time.monotonic() - started >= 0.1
    assert is_idle(engine)


@pytest.mark.parametrize("how", ["raises", "raises at once", "fails", "is cancelled", "is too short"])
def test_a_remote_row_that_fails_fails_its_request_alone(engine: Engine, how: str) -> None:
    class Failing(Promised):
        def logits(self, generated: Sequence[int]) -> Future[Floats]:
            if how == "raises at once" or (how == "raises" and generated):
                raise ConnectionError("unplugged")
            return super().logits(generated)

    row = Failing()
    leaning = engine.submit(Request((row, Row(TOKENS[:9])), ProbabilityMixture((0.5, 0.5)), SHORT))
    beside = engine.generate(TOKENS[:9], sampling=SHORT)
    until(lambda: len(row.futures) == 1 or how == "raises at once")
    if how == "fails":
        row.futures[0].set_exception(ConnectionError("unplugged"))
    elif how == "is cancelled":
        row.futures[0].cancel()
    elif row.futures:
        row.futures[0].set_result(np.zeros(VOCAB - (how == "is too short"), np.float32))
    error = collect(leaning).error
    assert isinstance(error, CollegiumError)
    expected = {"is cancelled": "CancelledError", "is too short": "vocabularies differ"}.get(how, "unplugged")
    assert expected in str(error)
    assert collect(beside).reason == "length"
    assert is_idle(engine)


def test_a_request_that_finds_no_room_asks_nothing_of_others(make_engine: Callable[..., Engine]) -> None:
    engine, row = make_engine(), Promised()
    tall = engine.generate(TOKENS, sampling=Sampling(max_tokens=400))
    brief = engine.generate(TOKENS, sampling=Sampling(max_tokens=20))
    rows = row, Row(TOKENS[:16]), Row(TOKENS[:16])  # which take 64 of the 76 pages
    leaning = engine.submit(Request(rows, ProbabilityMixture((0.5, 0.25, 0.25)), Sampling(max_tokens=490)))
    assert collect(brief).reason == "length"  # so it is tried again
    assert engine.stats().waiting == 1
    assert not row.futures
    assert not tall.cancelled.is_set()
    tall.close()
    until(lambda: len(row.futures) == 1)
    leaning.close()
    assert collect(leaning).reason == "cancelled"
    until(lambda: is_idle(engine))


@pytest.mark.parametrize("where", ["decoder", "combiner", "mask"])
def test_what_fails_in_a_step_fails_its_requests_and_no_others(
    engine: Engine, decoders: Mapping[str, Doubled], where: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Identity):
        def __call__(self, logits: Sequence[Floats], generated: Sequence[int] = ()) -> Floats:
            raise ZeroDivisionError("a combiner")

    def broken(logits: Floats, generated: Sequence[int]) -> None:
        if len(generated) == 2:
            raise ZeroDivisionError("a mask")

    request = Request((Row(TOKENS[:20], None, "small"),), sampling=SHORT)
    if where == "decoder":
        decoders["small"].failures = [None, MemoryError("a decoder")]
        decoders["small"].hold()
        bad = [engine.submit(request)]
        decoders["small"].wait()
        bad.append(engine.submit(request))
    else:
        changed: dict[str, Any] = {"combiner": Broken()} if where == "combiner" else {"masks": (broken,)}
        bad = [engine.submit(replace(request, **changed))]
    others = [engine.generate(TOKENS[:9], sampling=SHORT)]
    if where != "decoder":
        others.append(engine.submit(request))
    decoders["small"].let_go()
    for one in bad:
        error = collect(one).error
        assert error
        assert "The model failed" in error.message
        assert f"a {where}" in error.message
    assert [collect(one).reason for one in others] == ["length"] * len(others)
    assert collect(engine.submit(request)).reason == "length", "the engine goes on"
    assert is_idle(engine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_where_the_thread_ends_nobody_waits_in_vain(engine: Engine) -> None:
    class Quits(Identity):
        def __call__(self, logits: Sequence[Floats], generated: Sequence[int] = ()) -> Floats:
            raise SystemExit

    beside = engine.generate(TOKENS[:9], sampling=Sampling(max_tokens=400))
    assert "broke down" in str(collect(engine.submit(Request((Row(TOKENS[:9]),), Quits(), SHORT))).error)
    assert "broke down" in str(collect(beside).error)
    with pytest.raises(ModelUnavailable, match="closed"):
        engine.generate(TOKENS[:9], sampling=ONE)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_prompt_that_was_read_is_not_read_again(
    folders: Mapping[str, Path], law: Adapter, tokenizer: PreTrainedTokenizerFast, precision: Precision
) -> None:
    decoder = Doubled(open_decoder(folders["small"], precision))
    engine = Engine(decoder, tokenizer)
    sampling = replace(SHORT, logprobs=0)

    def ask(prompt: Sequence[int], adapter: Adapter | None) -> tuple[tuple[int, ...], tuple[float, ...], int]:
        before, passes = engine.stats().reused_tokens, len(decoder.passes)
        answer = collect(engine.generate(prompt, adapter=adapter, sampling=sampling))
        reused = engine.stats().reused_tokens - before
        assert decoder.passes[passes] == [len(prompt) - reused]
        return answer.tokens, answer.logprobs, reused

    def same(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return one == other if precision == "int8" else one == pytest.approx(other, abs=1e-4)

    tokens, logprobs, reused = ask(TOKENS, law)
    assert reused == 0
    again = ask(TOKENS, law)
    assert (again[0], again[2]) == (tokens, 32)
    assert same(again[1], logprobs)
    follow_up = [*TOKENS, *tokens, 5, 6, 7]
    warm = ask(follow_up, law)
    assert warm[2] == 48, "the answer is remembered too"
    for other in (None, replace(law, version="law-2")):
        cold = ask(follow_up, other)
        assert cold[2] == 0
    assert cold[0] == warm[0], "that was the same adapter under another name"
    assert same(cold[1], warm[1])
    assert ask([9, *TOKENS], law)[2] == 0
    engine.close()


def test_a_short_prompt_does_not_wait_for_a_long_one(
    engine: Engine, decoders: Mapping[str, Doubled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "prompt_tokens", 32)
    decoder = decoders["base"]
    decoder.hold()
    order: list[str] = []

    def ask(name: str, prompt: Sequence[int], sampling: Sampling) -> Any:
        generation = engine.generate(prompt, sampling=sampling)
        generation.listen(lambda item: order.append(name))
        return generation

    talking = ask("talking", TOKENS[:5], Sampling(max_tokens=60))
    decoder.step()
    ask("long", TOKENS[::-1] * 12, ONE)
    decoder.step(2)
    ask("short", TOKENS[:20], ONE)
    decoder.step(3)
    assert decoder.passes == [[5], [1], [1, 32], [1, 32], [1, 16, 16], [1, 28, 4]]
    assert "short" in order
    assert "long" not in order
    decoder.let_go()
    until(lambda: order.count("long") == 2)
    for tokens in decoder.passes[1:]:
        assert 1 in tokens, "who answers gets a token in every pass"
        assert sum(tokens) <= 32 + 1
    talking.close()


def test_adapters_are_read_between_passes_not_all_at_once(
    engine: Engine, decoders: Mapping[str, Doubled], law: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoders["small"]
    load = decoder.load

    def slow(slot: int, lora: LoraWeights) -> None:
        time.sleep(0.02)
        load(slot, lora)
        loaded_at.append(len(decoder.passes))

    loaded_at: list[int] = []
    monkeypatch.setattr(decoder, "load", slow)
    decoder.hold()
    talking = engine.submit(Request((Row(TOKENS, None, "small"),), sampling=Sampling(max_tokens=100)))
    decoder.wait()
    for name in "abc":
        engine.submit(Request((Row(TOKENS[:9], replace(law, version=name), "small"),), sampling=ONE))
    decoder.step(4)
    assert loaded_at == [1, 2, 3], "a pass lies between them"
    talking.close()


def test_the_pace_of_reading_is_learned() -> None:
    pace = Pace()
    assert pace.prompt_tokens == 32
    pace.took(0.004, 0)
    assert pace.prompt_tokens == 32, "what a token of a prompt takes is not known yet"
    pace.took(0.008, 16)
    assert 12 <= pace.prompt_tokens <= 13  # 0.25 ms a token, and 3.2 ms more are allowed
    for seconds, tokens in ((9.0, 1), (0.0, 1000)):
        pace.took(seconds, tokens)
        assert 4 <= pace.prompt_tokens <= 256


def test_prompts_share_a_pass_fairly() -> None:
    assert share([1, 1], 32) == [1, 1]
    assert share([400, 1, 10, 300], 32) == [11, 1, 10, 11]
    assert share([0, 5, 1], 3) == [0, 3, 1]
    crowd = share([50 - at for at in range(48)], 32)
    assert sum(crowd) == 32
    assert crowd[-32:] == [1] * 32, "where not all can read, those who are done soonest do"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": (Row(()),)}, InvalidRequest, "no tokens"),
        ({"rows": (Row([5, VOCAB]),)}, InvalidRequest, "not the model's"),
        ({"rows": (Row([5, -1]),)}, InvalidRequest, "not the model's"),
        ({"forced": (5, VOCAB)}, InvalidRequest, "not the model's"),
        ({"rows": (Row([5], None, "large"),)}, InvalidRequest, "'large'"),
        ({"rows": (Row([5]), Row([5]))}, InvalidRequest, "2 rows"),
        ({"rows": (Row([5]),) * 5, "combiner": ProbabilityMixture((0.2,) * 5)}, InvalidRequest, "5 rows, 4 run"),
        ({"rows": (Promised(),)}, InvalidRequest, "No row"),
        ({"sampling": Sampling(max_tokens=0)}, InvalidRequest, "no tokens"),
        ({"sampling": Sampling(temperature=-1)}, InvalidRequest, "temperature"),
        ({"sampling": Sampling(max_tokens=512)}, ContextTooLong, "513 tokens, and 512 fit"),
        ({"rows": (Row([5] * 600),)}, ContextTooLong, "fit"),
        (
            {"rows": (Row([5]),) * 4, "combiner": ProbabilityMixture((0.25,) * 4), "sampling": Sampling(400)},
            ContextTooLong,
            "401 tokens, and 304 fit",
        ),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    make_engine: Callable[..., Engine], change: dict[str, Any], error: type[CollegiumError], message: str
) -> None:
    engine = make_engine(max_rows=4)
    with pytest.raises(error, match=message) as caught:
        engine.submit(replace(Request((Row([5]),), sampling=SHORT), **change))
    assert caught.value.hint
    assert engine.stats().waiting == 0


def test_more_adapters_than_slots_are_refused(folders: Mapping[str, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    engine = Engine(open_decoder(folders["small"], slots=1), tokenizer)
    law, code = (Adapter(name, folders[name]) for name in ("law", "code"))
    mixture = ProbabilityMixture((0.5, 0.5))
    with pytest.raises(InvalidRequest, match="2 adapters"):
        engine.submit(Request((Row([5], law), Row([5], code)), mixture, SHORT))
    assert collect(engine.submit(Request((Row([5], law), Row([5], law)), mixture, SHORT))).reason == "length"
    engine.close()


def test_the_context_is_what_fits_a_row(folders: Mapping[str, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    for pages, fits in ((80, 512), (14, 160)):
        engine = Engine(open_decoder(folders["small"], pages=pages), tokenizer)
        assert engine.room() == fits
        assert collect(engine.generate([5] * (fits - 1), sampling=ONE)).reason == "length"
        with pytest.raises(ContextTooLong):
            engine.generate([5] * fits, sampling=ONE)
        engine.close()


def test_closing_waits_for_nobody_elsewhere(
    make_engine: Callable[..., Engine], decoders: Mapping[str, Doubled]
) -> None:
    engine, row = make_engine(max_rows=3), Promised()
    leaning = engine.submit(Request((Row(TOKENS[:9]), row), ProbabilityMixture((0.5, 0.5)), SHORT))
    local = engine.generate(TOKENS[:9], sampling=Sampling(max_tokens=40))
    waiting = engine.submit(Request((Row(TOKENS[:9]), Promised()), ProbabilityMixture((0.5, 0.5)), SHORT))
    until(lambda: engine.stats().running == 2)
    closing = threading.Thread(target=engine.close)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    assert [collect(one).reason for one in (leaning, local, waiting)] == ["cancelled", "length", "cancelled"]
    assert row.futures[-1].cancelled()
    assert is_idle(engine)


def test_what_is_over_is_forgotten(engine: Engine) -> None:
    class Big(Identity):
        pass

    combiner: Combiner = Big()
    gone = weakref.ref(combiner)
    generation = engine.submit(Request((Row(TOKENS[:9]),), combiner, SHORT))
    del combiner
    assert [len(delta.token_ids) for delta in generation] == [1] * 12 + [0]
    until(lambda: not gc.collect() or gone() is None)
    assert gone() is None
    assert list(generation) == [], "reading on does not wait"
