"""Many requests at once: what one is answered depends on nobody else, no adapter answers for another, and nothing leaks."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from collegium.errors import CollegiumError, Overloaded
from collegium.experts.engine.batch import Floats
from collegium.experts.engine.combine import Identity
from collegium.experts.engine.engine import Engine
from collegium.experts.engine.generation import Generation, Item
from collegium.experts.engine.mixing import ProbabilityMixture
from collegium.experts.engine.request import Request, Row
from collegium.experts.engine.slots import Adapter
from collegium.experts.engine.steering import LogitArithmetic
from collegium.models.cache import CachedModel
from collegium.models.load import load_tokenizer
from collegium.schema import Delta, Sampling
from collegium.tests.engine_doubles import (
    PRECISIONS,
    Answer,
    Doubled,
    Promised,
    assert_agrees,
    collect,
    is_idle,
    marker_lora,
    no_thread_is_left,
    open_decoder,
    until,
)
from collegium.tests.engine_models import VOCAB, reference, tiny_lm, tiny_lora

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


MARKERS = {f"marker-{token}": token for token in range(11, 83, 9)}
GREEDY = Sampling(max_tokens=12, logprobs=2)
WARM = Sampling(max_tokens=12, temperature=0.9, top_p=0.95, repetition_penalty=1.1, logprobs=2)


def tokens(seed: int, count: int) -> list[int]:
    """A random prompt."""
    return [int(one) for one in np.random.default_rng(seed).integers(3, VOCAB, count)]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm(tmp_path_factory.mktemp("base"), seed=3)


@pytest.fixture(scope="module")
def random_adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    root = tmp_path_factory.mktemp("random")
    return {
        name: Adapter(name, tiny_lora(root / name, base, seed=seed))
        for seed, name in enumerate(("law", "code", "tax"), 1)
    }


@pytest.fixture(scope="module")
def markers(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """Adapters that answer one token, each its own, whatever they are asked."""
    root = tmp_path_factory.mktemp("markers")
    return {name: Adapter(name, marker_lora(root / name, base, token)) for name, token in MARKERS.items()}


@pytest.fixture(scope="module", params=PRECISIONS)
def decoder(request: pytest.FixtureRequest, base: Path) -> Doubled:
    return Doubled(open_decoder(base, request.param))


@pytest.fixture
def make_engine(decoder: Doubled, tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., Engine]]:
    opened: list[Engine] = []

    def make(**options: Any) -> Engine:
        opened.append(Engine(decoder, tokenizer, **options))
        return opened[-1]

    with no_thread_is_left():
        yield make
        for engine in opened:
            engine.close()
    decoder.reset()


def test_markers_are_told_apart_by_transformers_too(base: Path, markers: Mapping[str, Adapter]) -> None:
    prompts = [tokens(seed, 3 + 7 * seed) for seed in range(6)]
    plain = reference(base)
    assert not {int(plain(prompt)[-1].argmax()) for prompt in prompts} & {*MARKERS.values()}
    for name, adapter in markers.items():
        logits = reference(base, adapter.folder)
        for prompt in prompts:
            row = logits(prompt)[-1]
            assert row.argmax() == MARKERS[name]
            assert np.diff(np.sort(row))[-1] > 0.5


def test_no_answer_comes_from_another_adapter(
    make_engine: Callable[..., Engine], base: Path, markers: Mapping[str, Adapter]
) -> None:
    """1,000 requests of 16 threads for 8 adapters and none, which share 4 slots."""
    engine = make_engine(max_rows=12, max_queue=1000)
    prompts = [tokens(seed, 40) for seed in range(5)]
    plain = [reference(base)(prompt) for prompt in prompts]
    given = Counter[tuple[str, bool]]()

    def ask(number: int) -> None:
        draw = random.Random(number)
        name, at, length = draw.choice([*markers, ""]), draw.randrange(5), draw.randint(1, 40)
        sampling = Sampling(max_tokens=draw.randint(1, 4))
        answer = collect(engine.generate(prompts[at][:length], adapter=markers.get(name), sampling=sampling))
        if name:
            right = answer.tokens == (MARKERS[name],) * sampling.max_tokens
        else:
            second, first = np.argsort(plain[at][length - 1])[-2:]
            right = answer.reason == "stop" or answer.tokens[0] in (first, second)
        given[name, right] += 1

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(1000)))
    assert given.total() == 1000
    assert not any(count for (_, right), count in given.items() if not right)
    assert is_idle(engine)
    assert engine.stats().adapters == 4


@dataclass
class Asked:
    """A request that is asked alone and in company."""

    request: Request
    alone: Answer


def requests(adapters: Mapping[str, Adapter]) -> list[Request]:
    """Of all kinds, with prompts that begin alike, over up to ten pages."""
    asked = []
    for at in range(12):
        prompt = tokens(at % 3, 150)[: 5 + 13 * at]
        adapter = [None, *adapters.values()][at % 4]
        asked.append(Request((Row(prompt, adapter),), sampling=[GREEDY, WARM][at % 2], seed=at))
    law, code = adapters["law"], adapters["code"]
    three = Row(tokens(1, 70)), Row(tokens(1, 50), law), Row(tokens(1, 50))
    asked.append(Request(three, LogitArithmetic(1.5), GREEDY))
    asked.append(
        Request((Row(tokens(2, 30), code), Row(tokens(2, 31), law)), ProbabilityMixture((0.4, 0.6)), WARM, seed=1)
    )
    asked.append(Request((Row(tokens(4, 20), law),), forced=tuple(tokens(5, 12))))
    return asked


def disturb(engine: Engine, adapters: Mapping[str, Adapter], stop: threading.Event, seed: int) -> None:
    """Ask for this and that, much of it cancelled, with long prompts that are read in chunks."""
    draw = random.Random(seed)
    while not stop.is_set():
        prompt = tokens(draw.randrange(3), 300)[: draw.choice([1, 5, 40, 150, 300])]
        adapter = draw.choice([None, *adapters.values()])
        sampling = replace(draw.choice([GREEDY, WARM]), max_tokens=draw.choice([1, 5, 60]))
        try:
            generation = engine.generate(prompt, adapter=adapter, sampling=sampling)
        except Overloaded:
            continue
        if draw.random() < 0.5:
            time.sleep(draw.random() * 0.01)
            generation.close()
        collect(generation)


def test_an_answer_does_not_depend_on_who_else_is_there(
    make_engine: Callable[..., Engine], decoder: Doubled, base: Path, random_adapters: Mapping[str, Adapter]
) -> None:
    asked = []
    for request in requests(random_adapters):
        engine = make_engine()  # which has read nothing before
        asked.append(Asked(request, collect(engine.submit(request))))
        engine.close()
    engine, stop = make_engine(max_rows=10), threading.Event()
    threads = [threading.Thread(target=disturb, args=(engine, random_adapters, stop, seed)) for seed in range(3)]
    for thread in threads:
        thread.start()
    parted = 0
    for turn in range(3):
        random.Random(turn).shuffle(asked)
        running = [engine.submit(one.request) for one in asked]
        for one, generation in zip(asked, running, strict=True):
            found = collect(generation)
            if decoder.precision == "int8":
                assert found == one.alone
            else:
                parted += parts(found, one, base)
    stop.set()
    for thread in threads:
        thread.join()
    assert max(len(one) for one in decoder.passes) > 4, "it was crowded"
    assert parted <= 1, "sums in another order may rarely tip a draw"
    until(lambda: is_idle(engine))


def parts(found: Answer, asked: Asked, base: Path) -> bool:
    """Whether sums in another order gave another token; a greedy one may differ only where nearly nothing decides it."""
    alone, row = asked.alone, asked.request.local[0]
    same = next((at for at, pair in enumerate(zip(found.tokens, alone.tokens, strict=False)) if pair[0] != pair[1]), 12)
    assert found.logprobs[:same] == pytest.approx(alone.logprobs[:same], abs=1e-3)
    if same == 12 or found.tokens == alone.tokens:
        return False
    if len(asked.request.rows) == 1 and not asked.request.sampling.temperature:
        logits = reference(base, row.adapter.folder if row.adapter else None)
        assert_agrees(found.tokens, alone.tokens, row.prompt, logits)
        return False
    return True


class Traffic(RuleBasedStateMachine):
    """Requests of all kinds, and all that can go wrong with them, on an engine with little room."""

    decoder: Doubled
    tokenizer: PreTrainedTokenizerFast
    adapters: Mapping[str, Adapter]
    alone: Callable[[Request], Answer]

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(self.decoder, self.tokenizer, max_rows=4, max_queue=4)
        self.asked: list[tuple[Generation, list[Item], Request | None]] = []
        self.promised = Promised()

    @rule(
        seed=st.integers(0, 2),
        length=st.sampled_from([1, 16, 17, 40, 90]),
        adapter=st.sampled_from(["", "law", "code", "tax", "broken"]),
        warm=st.booleans(),
        patience=st.sampled_from([None, None, None, -1.0, 0.002]),
    )
    def ask(self, seed: int, length: int, adapter: str, warm: bool, patience: float | None) -> None:
        row = Row(tokens(seed, 90)[:length], self.adapters.get(adapter))
        request = Request((row,), sampling=WARM if warm else GREEDY, seed=seed)
        self.submit(replace(request, deadline=patience and time.monotonic() + patience), same=adapter != "broken")

    @rule(
        seed=st.integers(0, 2),
        length=st.sampled_from([5, 33, 60]),
        mix=st.booleans(),
        name=st.sampled_from(["law", "code", "broken"]),
    )
    def ask_a_formula(self, seed: int, length: int, mix: bool, name: str) -> None:
        prompt, law, other = tokens(seed, 90)[:length], self.adapters["law"], self.adapters[name]
        if mix:
            request = Request((Row(prompt, law), Row(prompt[1:], other)), ProbabilityMixture((0.3, 0.7)), GREEDY)
        else:
            request = Request((Row(prompt), Row(prompt, other), Row(prompt)), LogitArithmetic(0.7), WARM, seed=seed)
        self.submit(request, same=name != "broken")

    @rule(length=st.sampled_from([5, 60]), first=st.booleans())
    def ask_with_a_remote_row(self, length: int, first: bool) -> None:
        rows = self.promised, Row(tokens(0, 90)[:length], self.adapters["code"])
        self.submit(Request(rows[:: 1 if first else -1], ProbabilityMixture((0.5, 0.5)), GREEDY), same=False)

    @rule(where=st.sampled_from(["combiner", "mask", "listener"]), after=st.integers(0, 3))
    def ask_what_breaks(self, where: str, after: int) -> None:
        steps = iter(range(99))

        def fail(*_: object) -> None:
            if next(steps) >= after:
                raise ZeroDivisionError

        class Broken(Identity):
            def __call__(self, logits: Sequence[Floats], generated: Sequence[int] = ()) -> Floats:
                fail()
                return logits[0]

        request = Request((Row(tokens(1, 20)),), sampling=GREEDY)
        if where == "listener":
            self.submit(request, same=False, also=fail)
        else:
            changed: dict[str, Any] = {"combiner": Broken()} if where == "combiner" else {"masks": (fail,)}
            self.submit(replace(request, **changed), same=False)

    @rule(fails=st.booleans(), which=st.integers(0, 9))
    def keep_a_promise(self, fails: bool, which: int) -> None:
        waiting = [one for one in self.promised.futures if not one.done()]
        if waiting:
            future = waiting[which % len(waiting)]
            if not future.set_running_or_notify_cancel():
                return
            if fails:
                future.set_exception(ConnectionError("unplugged"))
            else:
                future.set_result(np.zeros(VOCAB, np.float32))

    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        if self.asked:
            self.asked[which % len(self.asked)][0].close()

    @rule(healthy=st.integers(0, 2))
    def break_a_pass(self, healthy: int) -> None:
        self.decoder.failures = [*[None] * healthy, MemoryError("too much")]

    @rule()
    def hold(self) -> None:
        self.decoder.hold()

    @rule()
    def let_go(self) -> None:
        self.decoder.let_go()

    @rule(seconds=st.sampled_from([0.0005, 0.003]))
    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def submit(self, request: Request, *, same: bool = True, also: Callable[[Item], None] | None = None) -> None:
        try:
            generation = self.engine.submit(request)
        except Overloaded:
            assert self.engine.stats().waiting >= 4 or len(self.asked) > 4
            return
        items: list[Item] = []

        def listen(item: Item) -> None:
            items.append(item)
            if also:
                also(item)

        try:
            generation.listen(listen)
        except ZeroDivisionError:  # what had come before was handed over here
            generation.listen(items.append)
        self.asked.append((generation, items, request if same else None))

    def teardown(self) -> None:
        self.decoder.let_go()
        for future in self.promised.futures[::2]:
            if future.set_running_or_notify_cancel() if not future.done() else False:
                future.set_exception(ConnectionError("unplugged"))
        if len(self.asked) % 2:
            for generation, _, request in self.asked:
                if request is None:
                    generation.close()
            until(lambda: is_idle(self.engine))
        self.engine.close()
        assert is_idle(self.engine)
        self.decoder.failures.clear()
        for _, items, request in self.asked:
            last = [isinstance(item, CollegiumError) or item.finish_reason is not None for item in items]
            assert last == [False] * (len(items) - 1) + [True]
            if request:
                self.check(items, self.alone(replace(request, deadline=None)))

    def check(self, items: Sequence[Item], alone: Answer) -> None:
        deltas = [item for item in items if isinstance(item, Delta)]
        found = tuple(token for delta in deltas for token in delta.token_ids)
        assert found == alone.tokens[: len(found)]
        if self.decoder.precision == "int8":
            assert tuple(one for delta in deltas for one in delta.logprobs or ()) == alone.logprobs[: len(found)]
        if deltas and deltas[-1].finish_reason in ("stop", "length"):
            assert (found, deltas[-1].finish_reason) == (alone.tokens, alone.reason)


def test_nothing_leaks_whatever_happens(
    base: Path,
    decoder: Doubled,
    tokenizer: PreTrainedTokenizerFast,
    random_adapters: Mapping[str, Adapter],
    tmp_path: Path,
) -> None:
    calm, known = Engine(decoder, tokenizer), dict[str, Answer]()

    def ask_alone(asked: Request) -> Answer:
        if repr(asked) not in known:
            known[repr(asked)] = collect(calm.submit(asked))
        return known[repr(asked)]

    class Here(Traffic):
        alone = staticmethod(ask_alone)

    Here.decoder = Doubled(open_decoder(base, decoder.precision, pages=24, slots=2))
    Here.tokenizer = tokenizer
    Here.adapters = {**random_adapters, "broken": Adapter("broken", tmp_path)}
    with no_thread_is_left():
        run_state_machine_as_test(Here, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))
        calm.close()
