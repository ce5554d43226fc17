from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from collegium.errors import CollegiumError, ModelUnavailable, Overloaded
from collegium.experts.engine import worker
from collegium.experts.engine.worker import Adapter, Engine, Generation
from collegium.models.cache import CachedModel, ModelCache
from collegium.models.chat import ChatEncoder
from collegium.models.load import load_lm, load_tokenizer
from collegium.schema import Delta, Message, Sampling
from collegium.settings import DEFAULT_BASE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GREEDY = Sampling(max_tokens=24)
LONG = Sampling(max_tokens=450)
PROMPTS = ["the contract", "a loop in the inner theatre", "12"]
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny"))


@pytest.fixture
def make_engine(tiny_base: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[MakeEngine]:
    import torch

    torch.set_num_threads(1)
    opened: list[Engine] = []

    def make(max_queue: int = 64) -> Engine:
        model = load_lm(
            CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny"), device=torch.device("cpu"), dtype=torch.float32
        )
        opened.append(Engine(model, tokenizer, max_queue=max_queue))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def loaded(adapters: Mapping[str, Path]) -> dict[str, Adapter | None]:
    """What the base model can answer with, by expert."""
    return {"base": None, **{name: Adapter(name, folder) for name, folder in adapters.items()}}


@pytest.fixture(scope="module")
def expected(
    tiny_base: Path, adapters: Mapping[str, Path], tokenizer: PreTrainedTokenizerFast
) -> dict[tuple[str, str], list[int]]:
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
            answers[name, prompt] = out[0, ids.shape[1] :].tolist()
    return answers


def tokens(generation: Generation) -> list[int]:
    return [token for delta in generation for token in delta.token_ids]


def test_the_fixture_tells_experts_apart(expected: Mapping[tuple[str, str], list[int]]) -> None:
    assert len({tuple(answer) for answer in expected.values()}) == len(expected)


def test_greedy_answers_are_those_of_transformers_and_peft(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    loaded: Mapping[str, Adapter | None],
    expected: Mapping[tuple[str, str], list[int]],
) -> None:
    for turn in range(2):  # base before any adapter, and after all of them
        for (name, prompt), answer in expected.items():
            generation = engine.generate(tokenizer.encode(prompt), adapter=loaded[name], sampling=GREEDY)
            deltas = list(generation)
            assert [token for delta in deltas for token in delta.token_ids] == answer, (turn, name)
            assert "".join(delta.text for delta in deltas) == tokenizer.decode(answer)
            assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
            assert generation.prompt_tokens == len(tokenizer.encode(prompt))


def test_adapters_never_mix_whatever_the_threads(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    loaded: Mapping[str, Adapter | None],
    expected: Mapping[tuple[str, str], list[int]],
) -> None:
    def ask(key: tuple[str, str]) -> list[int]:
        return tokens(engine.generate(tokenizer.encode(key[1]), adapter=loaded[key[0]], sampling=GREEDY))

    keys = [key for _ in range(4) for key in expected]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, keys)) == [expected[key] for key in keys]


def test_adapters_that_had_to_leave_come_back_the_same(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    loaded: Mapping[str, Adapter | None],
    expected: Mapping[tuple[str, str], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "LOADED_ADAPTERS", 2)
    law = loaded["law"]
    assert law
    more = [("law", replace(law, version=f"law-{number}")) for number in range(3)]
    for name, adapter in [*loaded.items(), *more, *loaded.items(), more[0], *loaded.items()]:
        for prompt in PROMPTS:
            generation = engine.generate(tokenizer.encode(prompt), adapter=adapter, sampling=GREEDY)
            assert tokens(generation) == expected[name, prompt]


def test_a_temperature_of_almost_nothing_is_greedy(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, expected: Mapping[tuple[str, str], list[int]]
) -> None:
    cold = Sampling(max_tokens=24, temperature=1e-6, top_p=0.5)
    for prompt in PROMPTS:
        assert tokens(engine.generate(tokenizer.encode(prompt), sampling=cold)) == expected["base", prompt]


@pytest.mark.models
def test_the_real_model_knows_the_capital_of_france(real_home: Path) -> None:
    import torch

    model = ModelCache(real_home / "models").get(DEFAULT_BASE)
    tokenizer = load_tokenizer(model)
    engine = Engine(load_lm(model, device=torch.device("cpu"), dtype=torch.float32), tokenizer)
    ids = ChatEncoder(tokenizer).encode([Message("user", "What is the capital of France?")])
    deltas = list(engine.generate(ids, sampling=Sampling(max_tokens=30)))
    engine.close()
    assert "Paris" in "".join(delta.text for delta in deltas)
    assert deltas[-1].finish_reason == "stop"


def test_a_seed_reproduces_an_answer(engine: Engine) -> None:
    warm = Sampling(max_tokens=24, temperature=1.0, top_p=0.9, top_k=20)
    one, again, other = (tokens(engine.generate([5, 6, 7], sampling=warm, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other


def test_without_a_seed_answers_differ_even_after_one_with(engine: Engine) -> None:
    warm = Sampling(max_tokens=24, temperature=1.0)
    after = []
    for _ in range(2):
        tokens(engine.generate([5, 6, 7], sampling=warm, seed=1))
        after.append(tokens(engine.generate([5, 6, 7], sampling=warm)))
    assert after[0] != after[1]


def test_an_answer_ends_at_the_end_token_which_is_not_shown(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
    hot = Sampling(max_tokens=400, temperature=2.0)
    for seed in range(20):
        deltas = list(engine.generate([5, 6, 7], sampling=hot, seed=seed))
        if deltas[-1].finish_reason == "stop":
            break
    assert deltas[-1].finish_reason == "stop"
    assert tokenizer.eos_token_id not in [token for delta in deltas for token in delta.token_ids]
    assert "<|im_end|>" not in "".join(delta.text for delta in deltas)


def test_a_stop_string_across_tokens_cuts_exactly(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, expected: Mapping[tuple[str, str], list[int]]
) -> None:
    prompt = PROMPTS[0]
    whole = tokenizer.decode(expected["base", prompt])
    for start, size in ((0, 1), (4, 3), (9, 5), (len(whole) - 2, 2)):
        stop = str(whole[start : start + size])
        sampling = Sampling(max_tokens=24, stop=("never to be seen", stop))
        deltas = list(engine.generate(tokenizer.encode(prompt), sampling=sampling))
        assert "".join(delta.text for delta in deltas) == whole[: whole.index(stop)]
        assert deltas[-1].finish_reason == "stop"


def test_closing_stops_before_the_next_token(engine: Engine) -> None:
    generation = engine.generate([5, 6, 7], sampling=LONG)
    seen: list[Delta] = []

    def take(item: Delta | CollegiumError) -> None:  # in the engine's thread, so that no token slips in between
        assert isinstance(item, Delta)
        seen.append(item)
        if len(seen) == 3:
            generation.close()

    generation.listen(take)
    assert tokens(engine.generate([5], sampling=Sampling(max_tokens=1)))  # answered after the first one
    assert seen[-1].finish_reason == "cancelled"
    assert len([delta for delta in seen if delta.token_ids]) <= 3 + 1  # one may have come before `listen`


def test_what_was_closed_while_it_waited_costs_nothing(engine: Engine) -> None:
    first = engine.generate([5, 6, 7], sampling=LONG)
    second = engine.generate([5, 6, 7], sampling=LONG)
    second.close()
    first.close()
    assert [delta.finish_reason for delta in second] == ["cancelled"]


def test_a_deadline_that_has_passed_cancels(engine: Engine) -> None:
    generation = engine.generate([5, 6, 7], sampling=LONG, deadline=time.monotonic() - 1)
    deltas = list(generation)
    assert deltas[-1].finish_reason == "cancelled"
    assert sum(len(delta.token_ids) for delta in deltas) <= 1


def test_a_full_queue_refuses(make_engine: MakeEngine) -> None:
    engine = make_engine(max_queue=2)
    running = engine.generate([5, 6, 7], sampling=LONG)
    next(iter(running))  # it has left the queue
    waiting = [engine.generate([5], sampling=Sampling(max_tokens=1)) for _ in range(2)]
    with pytest.raises(Overloaded, match="2 requests") as caught:
        engine.generate([5], sampling=GREEDY)
    assert caught.value.retryable
    assert caught.value.hint
    running.close()
    assert all(len(tokens(one)) == 1 for one in waiting)
    assert len(tokens(engine.generate([5], sampling=GREEDY))) == 24


def test_closing_the_engine_leaves_nobody_waiting(make_engine: MakeEngine) -> None:
    engine = make_engine()
    running = engine.generate([5, 6, 7], sampling=Sampling(max_tokens=50))
    next(iter(running))
    waiting = [engine.generate([5, 6, 7], sampling=LONG) for _ in range(3)]
    engine.close()
    engine.close()
    assert list(running)[-1].finish_reason in ("length", "cancelled")
    assert [[delta.finish_reason for delta in one] for one in waiting] == [["cancelled"]] * 3
    with pytest.raises(ModelUnavailable, match="closed"):
        engine.generate([5], sampling=GREEDY)


def without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def with_garbage(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"garbage")


def with_other_shapes(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({name: tensor[:, :3].contiguous() for name, tensor in load_file(path).items()}, path)


def without_a_layer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "layers.1." not in name}, path)


def without_a_configuration(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    "damage", [without_weights, with_garbage, with_other_shapes, without_a_layer, without_a_configuration]
)
@pytest.mark.parametrize("first", ["broken", "sound"])
def test_a_broken_adapter_fails_alone_and_every_time(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    loaded: Mapping[str, Adapter | None],
    expected: Mapping[tuple[str, str], list[int]],
    adapters: Mapping[str, Path],
    tmp_path: Path,
    damage: Callable[[Path], None],
    first: str,
) -> None:
    broken = Adapter("broken", shutil.copytree(adapters["law"], tmp_path / "broken"))
    damage(broken.folder)
    ids = tokenizer.encode(PROMPTS[0])
    if first == "sound":
        assert tokens(engine.generate(ids, adapter=loaded["law"], sampling=GREEDY)) == expected["law", PROMPTS[0]]
    for name in ("base", "code", "law"):
        with pytest.raises(CollegiumError):
            tokens(engine.generate(ids, adapter=broken, sampling=GREEDY))
        assert tokens(engine.generate(ids, adapter=loaded[name], sampling=GREEDY)) == expected[name, PROMPTS[0]]
