"""Requests of one row: what transformers and PEFT answer, how answers end, who waits."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from collegium.errors import CollegiumError, ModelUnavailable, Overloaded
from collegium.experts.engine.engine import Engine
from collegium.experts.engine.generation import Generation
from collegium.experts.engine.slots import Adapter
from collegium.models.cache import CachedModel
from collegium.models.load import load_tokenizer
from collegium.schema import Delta, Sampling
from collegium.tests.engine_doubles import PRECISIONS, Doubled, collect, no_thread_is_left, open_decoder, until

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from collegium.tests.engine_doubles import Precision

GREEDY = Sampling(max_tokens=24)
ONE = Sampling(max_tokens=1)
LONG = Sampling(max_tokens=450)
PROMPTS = ["the contract", "a loop in the inner theatre", "12"]
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny"))


@pytest.fixture
def make_engine(tiny_base: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[MakeEngine]:
    opened: list[Engine] = []

    def make(precision: Precision = "float32", slots: int = 4, **options: Any) -> Engine:
        opened.append(Engine(open_decoder(tiny_base, precision, slots=slots), tokenizer, **options))
        return opened[-1]

    with no_thread_is_left():
        yield make
        for engine in opened:
            engine.close()


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def shared(tiny_base: Path) -> Doubled:
    """A decoder that outlives engines."""
    return Doubled(open_decoder(tiny_base))


@pytest.fixture
def held(shared: Doubled, tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., tuple[Engine, Doubled]]]:
    """A function that opens an engine that makes a pass when the test says so."""
    opened: list[Engine] = []

    def open_held(**options: Any) -> tuple[Engine, Doubled]:
        shared.hold()
        opened.append(Engine(shared, tokenizer, **options))
        return opened[-1], shared

    yield open_held
    shared.let_go()
    for engine in opened:
        engine.close()
    shared.reset()


@pytest.fixture(scope="module")
def loaded(adapters: Mapping[str, Path]) -> dict[str, Adapter | None]:
    """What the base model can answer with, by expert."""
    return {"base": None, **{name: Adapter(name, folder) for name, folder in adapters.items()}}


@pytest.fixture(scope="module")
def expected(
    tiny_base: Path, adapters: Mapping[str, Path], tokenizer: PreTrainedTokenizerFast
) -> dict[tuple[str, str], tuple[int, ...]]:
    """Greedy tokens of each expert for each prompt, as transformers and PEFT generate them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    answers = {}
    for name in ("base", *adapters):
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_base)  # in evaluation mode, as PEFT's is
        if name in adapters:
            model = PeftModel.from_pretrained(model, adapters[name])
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer.encode(prompt)])
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24
                )
            answers[name, prompt] = tuple(out[0, ids.shape[1] :].tolist())
    return answers


def test_the_fixture_tells_experts_apart(expected: Mapping[tuple[str, str], tuple[int, ...]]) -> None:
    assert len(set(expected.values())) == len(expected)


def test_greedy_answers_are_those_of_transformers_and_peft(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    loaded: Mapping[str, Adapter | None],
    expected: Mapping[tuple[str, str], tuple[int, ...]],
) -> None:
    for turn in range(2):  # base before any adapter, and after all of them
        for (name, prompt), answer in expected.items():
            generation = engine.generate(tokenizer.encode(prompt), adapter=loaded[name], sampling=GREEDY)
            found = collect(generation)
            assert (found.tokens, found.reason) == (answer, "length"), (turn, name)
            assert found.text == tokenizer.decode(list(answer))
            assert generation.prompt_tokens == len(tokenizer.encode(prompt))


def test_adapters_never_mix_whatever_the_threads(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    loaded: Mapping[str, Adapter | None],
    expected: Mapping[tuple[str, str], tuple[int, ...]],
) -> None:
    def ask(key: tuple[str, str]) -> tuple[int, ...]:
        return collect(engine.generate(tokenizer.encode(key[1]), adapter=loaded[key[0]], sampling=GREEDY)).tokens

    keys = [key for _ in range(4) for key in expected]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, keys)) == [expected[key] for key in keys]


def test_adapters_that_had_to_leave_come_back_the_same(
    make_engine: MakeEngine,
    tokenizer: PreTrainedTokenizerFast,
    loaded: Mapping[str, Adapter | None],
    expected: Mapping[tuple[str, str], tuple[int, ...]],
) -> None:
    engine = make_engine(slots=2)
    law = loaded["law"]
    assert law
    more = [("law", replace(law, version=f"law-{number}")) for number in range(3)]
    for name, adapter in [*loaded.items(), *more, *loaded.items(), more[0], *loaded.items()]:
        for prompt in PROMPTS:
            generation = engine.generate(tokenizer.encode(prompt), adapter=adapter, sampling=GREEDY)
            assert collect(generation).tokens == expected[name, prompt]
    assert engine.stats().adapters == 2


def test_a_temperature_of_almost_nothing_is_greedy(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, expected: Mapping[tuple[str, str], tuple[int, ...]]
) -> None:
    cold = Sampling(max_tokens=24, temperature=1e-6, top_p=0.5)
    for prompt in PROMPTS:
        assert collect(engine.generate(tokenizer.encode(prompt), sampling=cold)).tokens == expected["base", prompt]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_seed_reproduces_an_answer(make_engine: MakeEngine, precision: Precision) -> None:
    engine, warm = make_engine(precision), Sampling(max_tokens=24, temperature=1.0, top_p=0.9, top_k=20)
    one, again, other = (collect(engine.generate([5, 6, 7], sampling=warm, seed=seed)).tokens for seed in (1, 1, 2))
    assert one == again != other


def test_without_a_seed_answers_differ_even_after_one_with(engine: Engine) -> None:
    warm = Sampling(max_tokens=24, temperature=1.0)
    after = []
    for _ in range(2):
        collect(engine.generate([5, 6, 7], sampling=warm, seed=1))
        after.append(collect(engine.generate([5, 6, 7], sampling=warm)))
    assert after[0] != after[1]


def test_an_answer_ends_at_the_end_token_which_is_not_shown(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
    hot = Sampling(max_tokens=400, temperature=2.0)
    answers = (collect(engine.generate([5, 6, 7], sampling=hot, seed=seed)) for seed in range(20))
    answer = next(one for one in answers if one.reason == "stop")
    assert tokenizer.eos_token_id not in answer.tokens
    assert "<|im_end|>" not in answer.text


def test_a_stop_string_across_tokens_cuts_exactly(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, expected: Mapping[tuple[str, str], tuple[int, ...]]
) -> None:
    prompt = PROMPTS[0]
    whole = str(tokenizer.decode(list(expected["base", prompt])))
    for start, size in ((0, 1), (4, 3), (9, 5), (len(whole) - 2, 2)):
        stop = whole[start : start + size]
        sampling = Sampling(max_tokens=24, stop=("never to be seen", stop))
        answer = collect(engine.generate(tokenizer.encode(prompt), sampling=sampling))
        assert (answer.text, answer.reason) == (whole[: whole.index(stop)], "stop")


def test_closing_stops_before_the_next_token(engine: Engine) -> None:
    generation = engine.generate([5, 6, 7], sampling=LONG)
    seen: list[Delta] = []
    ended = threading.Event()

    def take(item: Delta | CollegiumError) -> None:  # in the engine's thread, so that no token slips in between
        assert isinstance(item, Delta)
        seen.append(item)
        if len(seen) == 3:
            generation.close()
        if item.finish_reason:
            ended.set()

    generation.listen(take)
    assert ended.wait(10)
    assert seen[-1].finish_reason == "cancelled"
    # Some may have come before `listen`, all of which were handed over before the first could close.
    assert generation.cancelled.is_set()


def test_what_is_closed_leaves_before_the_next_pass(held: Callable[..., tuple[Engine, Doubled]]) -> None:
    engine, decoder = held(max_rows=2)
    one = engine.generate([5, 6, 0], sampling=LONG)
    decoder.wait()
    other = engine.generate([5, 6, 1], sampling=LONG)
    third = engine.generate([5, 6, 7], sampling=ONE)
    decoder.step()
    one.close()
    decoder.step()  # the one that had begun
    assert decoder.passes[-1] == [1, 3]
    assert collect(one).reason == "cancelled"
    decoder.step()
    assert decoder.passes[-1] == [1, 3], "the row is the third one's now"
    assert collect(third).reason == "length"
    other.close()


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("why", ["closed", "late"])
def test_what_nobody_wants_leaves_the_queue_wherever_it_stands(
    held: Callable[..., tuple[Engine, Doubled]], place: int, why: str
) -> None:
    engine, decoder = held(max_rows=1)
    running = engine.generate([5, 6, 7], sampling=LONG)
    decoder.wait()
    soon = time.monotonic() + 0.02 if why == "late" else None
    waiting = [engine.generate([5, at], sampling=ONE, deadline=soon if at == place else None) for at in range(3)]
    if why == "closed":
        waiting[place].close()
    time.sleep(0.03)
    decoder.step()
    assert [len(one) for one in decoder.passes] == [1]
    assert collect(waiting[place]).reason == "cancelled"
    assert engine.stats().waiting == 2
    running.close()
    decoder.let_go()
    assert [collect(one).reason for at, one in enumerate(waiting) if at != place] == ["length"] * 2


def test_who_waits_for_a_row_gets_it_when_the_last_one_leaves(make_engine: MakeEngine) -> None:
    engine = make_engine(max_rows=1)
    for _ in range(20):
        both = [engine.generate([5, 6, 7], sampling=Sampling(max_tokens=2)) for _ in range(2)]
        assert [collect(one).reason for one in both] == ["length"] * 2


def test_a_deadline_that_has_passed_cancels(engine: Engine) -> None:
    answer = collect(engine.generate([5, 6, 7], sampling=LONG, deadline=time.monotonic() - 1))
    assert (answer.tokens, answer.reason) == ((), "cancelled")


def test_a_deadline_cuts_an_answer_short(held: Callable[..., tuple[Engine, Doubled]]) -> None:
    engine, decoder = held()
    generation = engine.generate([5, 6, 7], sampling=LONG, deadline=time.monotonic() + 0.1)
    decoder.step(2)
    time.sleep(0.15)
    decoder.let_go()
    answer = collect(generation)
    assert (len(answer.tokens), answer.reason) == (3, "cancelled")


def test_a_full_queue_refuses(make_engine: MakeEngine) -> None:
    engine = make_engine(max_rows=1, max_queue=2)
    running = engine.generate([5, 6, 7], sampling=LONG)
    waiting = [engine.generate([5], sampling=ONE) for _ in range(2)]
    with pytest.raises(Overloaded, match="are waiting already") as caught:
        engine.generate([5], sampling=GREEDY)
    assert caught.value.retryable
    assert caught.value.hint
    running.close()
    assert all(len(collect(one).tokens) == 1 for one in waiting)
    assert len(collect(engine.generate([5], sampling=GREEDY)).tokens) == 24


def test_max_rows_run_and_max_queue_more_wait(held: Callable[..., tuple[Engine, Doubled]]) -> None:
    engine, decoder = held(max_rows=3, max_queue=2)
    asked = [engine.generate([5, at], sampling=ONE) for at in range(2)]
    decoder.wait()  # from here on, nobody starts until the pass is over: what has a free row does not count as waiting
    asked += [engine.generate([5, at], sampling=ONE) for at in range(3)]
    with pytest.raises(Overloaded):
        engine.generate([5], sampling=ONE)
    assert engine.stats().running + engine.stats().waiting == 5
    decoder.let_go()
    assert all(collect(one).reason == "length" for one in asked)


def test_closing_the_engine_leaves_nobody_waiting(held: Callable[..., tuple[Engine, Doubled]]) -> None:
    engine, decoder = held(max_rows=2)
    running = [engine.generate([5, 6, 7], sampling=Sampling(max_tokens=9)) for _ in range(2)]
    decoder.step(2)
    waiting = [engine.generate([5, 6, 7], sampling=LONG) for _ in range(3)]
    with ThreadPoolExecutor(2) as pool:
        closings = [pool.submit(engine.close) for _ in range(2)]
        until(lambda: all(one.cancelled.is_set() for one in waiting))
        assert not any(closing.done() for closing in closings), "something runs still"
        decoder.let_go()
    engine.close()
    assert [collect(one).reason for one in running] == ["length"] * 2
    assert [collect(one).reason for one in waiting] == ["cancelled"] * 3
    assert decoder.closed
    assert engine.stats().pages_used == 0
    with pytest.raises(ModelUnavailable, match="closed"):
        engine.generate([5], sampling=GREEDY)


def test_a_listener_may_close_the_engine(engine: Engine) -> None:
    engine.generate([5, 6, 7], sampling=ONE).listen(lambda _: engine.close())
    until(lambda: not engine._thread.is_alive())
    with pytest.raises(ModelUnavailable):
        engine.generate([5], sampling=ONE)


def test_an_error_is_raised_by_reading(engine: Engine, tmp_path: Path) -> None:
    generation = engine.generate([5, 6, 7], adapter=Adapter("nowhere", tmp_path), sampling=ONE)
    with pytest.raises(CollegiumError, match="nowhere"):
        list(generation)
    assert list(generation) == []


@pytest.mark.parametrize("when", [0, 2, 4])
def test_a_listener_that_fails_harms_nobody_else(
    engine: Engine, when: int, expected: Mapping[tuple[str, str], tuple[int, ...]], tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: list[Delta | CollegiumError] = []

    def listener(item: Delta | CollegiumError) -> None:
        seen.append(item)
        if len(seen) > when:
            raise RuntimeError("nobody is there")

    generation = Generation(3)
    generation.listen(listener)
    generation.put(Delta("a"))
    assert generation.cancelled.is_set() == (when == 0)
    seen.clear()
    engine.generate([5, 6, 7], sampling=Sampling(max_tokens=4)).listen(
        lambda item: None if not when else listener(item)
    )
    assert (
        collect(engine.generate(tokenizer.encode(PROMPTS[0]), sampling=GREEDY)).tokens == expected["base", PROMPTS[0]]
    )
    until(lambda: engine.stats().running == 0)


def without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def with_garbage(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"garbage")


def with_other_shapes(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({name: tensor[:, :3].contiguous() for name, tensor in load_file(path).items()}, path)


def without_a_half(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(path).items() if "layers.1.self_attn.q_proj.lora_A" not in name},
        path,
    )


def without_a_configuration(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    "damage", [without_weights, with_garbage, with_other_shapes, without_a_half, without_a_configuration]
)
@pytest.mark.parametrize("first", ["broken", "sound"])
def test_a_broken_adapter_fails_alone_and_every_time(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    loaded: Mapping[str, Adapter | None],
    expected: Mapping[tuple[str, str], tuple[int, ...]],
    adapters: Mapping[str, Path],
    tmp_path: Path,
    damage: Callable[[Path], None],
    first: str,
) -> None:
    broken = Adapter("broken", shutil.copytree(adapters["law"], tmp_path / "broken"))
    damage(broken.folder)
    ids = tokenizer.encode(PROMPTS[0])

    def ask(name: str) -> tuple[int, ...]:
        return collect(engine.generate(ids, adapter=loaded[name], sampling=GREEDY)).tokens

    if first == "sound":
        assert ask("law") == expected["law", PROMPTS[0]]
    for name in ("base", "code", "law"):
        assert collect(engine.generate(ids, adapter=broken, sampling=GREEDY)).error
        assert ask(name) == expected[name, PROMPTS[0]]
