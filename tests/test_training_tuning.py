"""How a training goes: steps and batches by the rows, memory by what there is, time told before, several processes as one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import InvalidRequest
from collegium.experts.adapters import CONFIG, WEIGHTS
from collegium.models.cache import CachedModel, ModelCache
from collegium.settings import Settings
from collegium.training.recipes import Row
from collegium.training.tuning import estimate as estimating
from collegium.training.tuning.bench import Bench
from collegium.training.tuning.checkpoints import last_checkpoint
from collegium.training.tuning.estimate import Estimate, estimate, needed_bytes, plan_course
from collegium.training.tuning.tuning import ROWS_AT_ONCE, Course, Tuning, adapt, course
from collegium.training.watch import Watch

ROWS = [Row((5, 6, 7 + at % 3), (9, 10)) for at in range(16)]


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> CachedModel:
    return ModelCache(tmp_path_factory.mktemp("models")).get(str(tiny_base))


def bounded(megabytes: float) -> Settings:
    return Settings(device="cpu").model_copy(update={"training_memory_mb": megabytes})


@pytest.mark.parametrize(("rows", "epochs"), [(1, 4.0), (499, 4.0), (500, 2.0), (1999, 2.0), (2000, 1.0), (90000, 1.0)])
def test_fewer_rows_are_passed_more_often(rows: int, epochs: float) -> None:
    assert Tuning().passes(rows) == epochs
    assert Tuning(epochs=0.5).passes(rows) == 0.5


@given(st.integers(1, 3000), st.integers(1, 64), st.integers(1, 8), st.floats(0.1, 5))
def test_a_course_covers_the_rows(rows: int, batch: int, most: int, epochs: float) -> None:
    way = course(Tuning(batch_size=batch, epochs=epochs), rows, most)
    assert way.at_once <= most
    assert min(batch, rows) <= way.batch < min(batch, rows) + way.accumulated
    assert way.steps * way.batch >= rows * epochs > (way.steps - 1) * way.batch


def test_a_batch_is_shared_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert course(Tuning(epochs=1.0), 160) == Course(steps=10, at_once=8, accumulated=2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert course(Tuning(epochs=1.0), 160) == Course(steps=10, at_once=4, accumulated=1, processes=4)


def test_less_memory_takes_fewer_rows_at_once(base: CachedModel) -> None:
    options = Tuning(epochs=1.0)
    row, widest = [needed_bytes(base.folder, options, rows, 5, 2) for rows in (1, ROWS_AT_ONCE)]
    assert plan_course(base, ROWS, options, bounded(widest / 1e6 + 0.001)).at_once == ROWS_AT_ONCE
    tight = plan_course(base, ROWS, options, bounded(row / 1e6 + 0.001))
    assert (tight.at_once, tight.accumulated, tight.steps) == (1, 16, 1)
    assert plan_course(base, ROWS, options, Settings(device="cpu")).at_once == ROWS_AT_ONCE
    with pytest.raises(InvalidRequest, match=r"a row of 5 tokens takes 0\.\d GB, and 0\.0 GB are free") as caught:
        plan_course(base, ROWS, options, bounded(1))
    assert caught.value.hint
    assert "max_length" in caught.value.hint


def test_memory_of_a_known_training(tmp_path: Path) -> None:
    """What a process was measured to take at its peak, with the shape of the default base model."""
    from transformers import LlamaConfig

    shape: dict[str, Any] = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"], **shape,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    for rows, width, kept, measured in ((8, 64, 8, 1669), (8, 256, 8, 4956), (4, 512, 8, 5716), (8, 64, 60, 1893)):
        assert needed_bytes(tmp_path, Tuning(), rows, width, kept) / 2**20 == pytest.approx(measured, rel=0.1)


def test_an_estimate_is_made_of_two_timed_layers(base: CachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = estimate(base, ROWS, Tuning(epochs=2.0), Settings(device="cpu"))
    assert (found.tokens, found.steps) == (160, 2)
    assert 0 < found.seconds < 60
    seconds = iter([0.1, 0.1, 0.3, 0.3])
    monkeypatch.setattr(estimating, "_step", lambda *_: next(seconds))
    timed = estimate(base, ROWS, Tuning(epochs=2.0), Settings(device="cpu"))
    assert timed.seconds == pytest.approx(4 * (0.1 + 0.1))  # four batches through two layers


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "1 seconds"), (89, "89 seconds"), (240, "4 minutes"), (9000, "2.5 hours")]
)
def test_an_estimate_is_said_in_words(seconds: float, said: str) -> None:
    told = str(Estimate(seconds, 1_900_000_000, 97_600, 100))
    assert told == f"about {said} and 1.9 GB for 97,600 tokens in 100 steps"


def test_a_checkpoint_that_is_not_whole_is_dropped(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step, whole in ((20, True), (100, True), (120, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            (folder / "complete.json").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20"]


TOGETHER = """
import sys
from pathlib import Path
from collegium.models.cache import ModelCache
from collegium.settings import Settings
from collegium.training.tuning.bench import Bench
from collegium.training.recipes import Row
from collegium.training.tuning.checkpoints import last_checkpoint
from collegium.training.tuning.tuning import Tuning
from collegium.training.watch import Watch

base = ModelCache(Path(sys.argv[2])).get(sys.argv[1])
folder = Path(sys.argv[3])
bench = Bench(base, Settings(home=folder, device="cpu"), folder, Watch(lambda stage, done, of: None))
rows = [Row((5, 6, 7 + at % 3), (9, 10)) for at in range(16)]
asked = bench.answers(["why"], max_tokens=3)
print(bench.tune(rows, Tuning(rank=2, epochs=4.0, learning_rate=0.01, batch_size=4))[1]["losses"], asked)
"""


def together(processes: int, tiny_base: Path, scratch: Path) -> Path:
    """The adapter that so many processes train, started as `accelerate launch` starts them."""
    folder = scratch / f"by-{processes}"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-W", "ignore", "-c", TOGETHER, str(tiny_base), str(scratch / "models"), str(folder)]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(processes),
        "ACCELERATE_USE_CPU": "true",
    }
    ranks = [{**shared, "RANK": str(at), "LOCAL_RANK": str(at)} if processes > 1 else {} for at in range(processes)]
    running = [
        subprocess.Popen(command, env={**os.environ, **rank, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    try:
        said = {process.communicate(timeout=600)[0] for process in running}
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0] * processes
    assert len(said) == 1, "all read what the first one left"
    return folder / "adapter"


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tiny_base: Path, base: CachedModel, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    alone, both = (together(processes, tiny_base, tmp_path) for processes in (1, 2))
    assert (alone / CONFIG).read_bytes() == (both / CONFIG).read_bytes()
    ours, theirs = load_file(alone / WEIGHTS), load_file(both / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # The same gradients, summed in another order.
        torch.testing.assert_close(tensor.float(), theirs[name].float(), rtol=0.1, atol=0.01)


@pytest.mark.gpu
def test_a_gpu_trains(base: CachedModel, tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    bench = Bench(base, Settings(home=tmp_path, device="cuda"), tmp_path, Watch(lambda stage, done, of: None))
    folder, report = bench.tune(ROWS, Tuning(rank=2, epochs=8.0, learning_rate=0.01))
    assert (folder / WEIGHTS).exists()
    assert report["steps"] == 8


def test_an_adapter_begins_where_another_ended(base: CachedModel, tmp_path: Path) -> None:
    import torch

    def weights(model: Any) -> dict[str, torch.Tensor]:
        return {name: one.detach().float() for name, one in model.named_parameters() if "lora_" in name}

    bench = Bench(base, Settings(home=tmp_path, device="cpu"), tmp_path, Watch(lambda stage, done, of: None))
    options = Tuning(rank=2, epochs=1.0, learning_rate=0.01)
    start, _ = bench.tune(ROWS, options, name="first")
    begun, new = (weights(adapt(bench.load(), options, at)) for at in (start, None))
    assert all(one.abs().sum() > 0 for one in begun.values())
    assert all(one.abs().sum() == 0 for name, one in new.items() if "lora_B" in name)
    again = weights(adapt(bench.load(), options))
    assert all(torch.equal(one, again[name]) for name, one in new.items()), (
        "the seed decides, not what was drawn before"
    )
