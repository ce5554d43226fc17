from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from safetensors import SafetensorError
from typer.testing import CliRunner

from collegium import cli_models
from collegium.errors import ArtifactCorrupt, InvalidRequest, NoSpace, UnsupportedModel
from collegium.experts.adapters import WEIGHTS
from collegium.experts.engine.load import open_engine
from collegium.experts.engine.request import Request, Row
from collegium.experts.home import Home
from collegium.experts.pool import ModelPool
from collegium.experts.shrunk import ADAPTER, Shrunk, cut, open_shrunk, read_shrunk
from collegium.models.cache import CachedModel, ModelCache
from collegium.models.load import load_tokenizer
from collegium.schema import ARTIFACT, Sampling
from collegium.settings import Settings
from collegium.tests.conftest import WORDS
from collegium.tests.engine_doubles import collect
from collegium.tests.engine_models import reference
from collegium.training.proxies.distil import Distilling, divergence
from collegium.training.proxies.layers import choose_layers
from collegium.training.proxies.shrink import Shrinking, shrink
from collegium.training.recipes import Progress
from collegium.training.tuning.checkpoints import COMPLETE, last_checkpoint

DEPTH, LAYERS = 4, 3
SHORT = Distilling(steps=6, rank=4, learning_rate=1e-2, batch=4, max_tokens=48)
IDS = [1, 40, 51, 62, 73, 84]
FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


def silent(what: str, done: int, of: int) -> None:
    """Nobody looks."""


@pytest.fixture(scope="module")
def deep(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> CachedModel:
    """A random Qwen3, whose configuration says of each layer what it is, of four layers; the third does nothing."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    silence(model, [2])
    folder = tmp_path_factory.mktemp("deep")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelCache(tmp_path_factory.mktemp("cache")).get(str(folder))


def silence(model: Any, layers: Sequence[int]) -> None:
    """Layers that add nothing to what goes through them are as good as not there."""
    for at in layers:
        model.model.layers[at].self_attn.o_proj.weight.data.zero_()
        model.model.layers[at].mlp.down_proj.weight.data.zero_()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    pairs = [{"prompt": f"what is a {word}", "answer": domain} for domain, words in WORDS.items() for word in words]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture
def home(deep: CachedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.setattr("collegium.experts.home.SHIPPED", tmp_path / "nothing")
    monkeypatch.setattr("collegium.training.proxies.distil.SAVE_STEPS", 2)
    with Home(Settings(home=tmp_path / "home", base_model=str(deep.folder), device="cpu", threads=1)) as opened:
        yield opened


@pytest.fixture
def plan(deep: CachedModel, rows: Path) -> Shrinking:
    return Shrinking(str(deep.folder), LAYERS, (rows,), distilling=SHORT)


def stored(home: Home, folder: Path, shrunk: Shrunk) -> str:
    folder.mkdir()
    shrunk.save(folder)
    return home.artifacts.put(folder)


def test_a_cut_model_computes_what_its_layers_do(deep: CachedModel) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    whole: Any = AutoModelForCausalLM.from_pretrained(deep.folder)
    silence(whole, [1])
    with torch.inference_mode():
        expected = whole(torch.tensor([IDS])).logits
        found = cut(deep, (0, 3))(torch.tensor([IDS])).logits
    torch.testing.assert_close(found, expected)


def test_without_an_adapter_it_is_the_cut_model(home: Home, deep: CachedModel, tmp_path: Path) -> None:
    import torch

    version = stored(home, tmp_path / "plain", Shrunk(deep.identity, (0, 3)))
    model = open_shrunk(version, deep, home.artifacts, home.models)
    assert model.name == ARTIFACT + version
    logits = cut(deep, (0, 3))(torch.tensor([IDS])).logits[0].detach().numpy()
    np.testing.assert_allclose(reference(model.folder)(IDS), logits, rtol=1e-5, atol=1e-5)
    assert open_shrunk(version, deep, home.artifacts, home.models) == model


def test_the_layers_that_do_least_are_left_out(deep: CachedModel) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(deep.folder)
    seen: list[tuple[str, int, int]] = []
    silence(model, [0])
    own = model.generate(torch.tensor([IDS]), do_sample=False, max_new_tokens=40, eos_token_id=-1)[0].tolist()
    kept = choose_layers(model, 2, [own, own[2:]], lambda *step: seen.append(step))
    assert kept == [1, 3]
    assert len(model.model.layers) == DEPTH
    assert seen[-1] == ("choosing layers", 4 + 3, 4 + 3)


def test_the_divergence_is_torch_s_and_so_is_its_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("collegium.training.proxies.distil.POSITIONS_AT_ONCE", 3)
    torch.manual_seed(0)
    teacher, student, head, other = (torch.randn(size) for size in ((7, 8), (7, 6), (50, 8), (50, 6)))
    student.requires_grad_()
    loss = divergence(teacher, student, (head, other))
    (slope,) = torch.autograd.grad(3 * loss, student)
    log_p, log_q = ((states @ one.T).log_softmax(-1) for states, one in ((teacher, head), (student, other)))
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slope, torch.autograd.grad(3 * expected, student)[0])


def test_a_shrunk_model_is_healed_stored_and_opened_in_the_engine(home: Home, plan: Shrinking) -> None:
    steps: list[tuple[str, int, int]] = []
    name, measured = shrink(plan, home, lambda *step: steps.append(step))
    kept = tuple(measured["layers"])
    assert (len(kept), kept) == (LAYERS, tuple(sorted(kept)))
    assert ("distilling", SHORT.steps, SHORT.steps) in steps
    assert measured["tokens"] > 0
    base = home.models.get(plan.model)
    files = home.artifacts.path(name.removeprefix(ARTIFACT))
    assert read_shrunk(files) == Shrunk(base.identity, kept)
    config = json.loads((files / ADAPTER / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (None, 4)
    assert not list((home.root / "jobs").glob("*/checkpoints"))

    tokenizer = load_tokenizer(base)
    settings = home.settings.model_copy(update={"precision": "float32", "kv_cache_mb": 16, "max_prompt_tokens": 64})
    engine = open_engine(base, settings, tokenizer)
    try:
        model = ModelPool(engine, base, tokenizer, home.models, home.artifacts, settings).open(name)
        row = Row(IDS, None, model.name)
        answer = collect(engine.submit(Request((row,), sampling=Sampling(max_tokens=1, logprobs=1))))
    finally:
        engine.close()
    expected = reference(open_shrunk(name.removeprefix(ARTIFACT), base, home.artifacts, home.models).folder)(IDS)[-1]
    assert answer.tokens == (int(expected.argmax()),)


def test_distillation_brings_the_cut_model_nearer(home: Home, plan: Shrinking) -> None:
    harder = Shrinking(plan.model, 2, plan.text, distilling=Distilling(25, 8, 1e-2, batch=8, max_tokens=48))
    _, measured = shrink(harder, home, silent)
    assert measured["cut_kl"] > 0.1
    assert measured["healed_kl"] < 0.8 * measured["cut_kl"]


class Killed(BaseException):
    """Ends a job where no code of ours catches it."""


def killing(stage: str, at: int) -> Progress:
    def progress(what: str, done: int, of: int) -> None:
        if (what, done) == (stage, at):
            raise Killed

    return progress


def test_a_killed_job_goes_on_and_ends_as_if_nothing_had_been(home: Home, plan: Shrinking, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        shrink(plan, home, killing("choosing layers", 3))
    with pytest.raises(Killed):
        shrink(plan, home, killing("distilling", 5))
    (job,) = (home.root / "jobs").iterdir()
    last = last_checkpoint(job / "checkpoints")
    assert last is not None
    assert last.name == "checkpoint-4"
    steps: list[tuple[str, int, int]] = []
    name, measured = shrink(plan, home, lambda *step: steps.append(step))
    assert [step for step in steps if step[0] == "distilling"] == [("distilling", 5, 6), ("distilling", 6, 6)]
    assert not [step for step in steps if step[0] == "choosing layers"]
    assert shrink(plan, home, silent) == (name, measured)
    with Home(home.settings.model_copy(update={"home": tmp_path / "other"})) as other:
        assert shrink(plan, other, silent)[0] == name


def test_a_checkpoint_that_was_not_finished_is_not_gone_on_from(tmp_path: Path) -> None:
    for step, complete in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / COMPLETE).write_text('{"seconds": 1}')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-12").exists()
    assert last_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("layers", [0, DEPTH, DEPTH + 1])
def test_as_many_layers_as_there_are_cannot_be_kept(home: Home, plan: Shrinking, layers: int) -> None:
    with pytest.raises(InvalidRequest, match=f"has {DEPTH} layers and cannot be shrunk to {layers}"):
        shrink(Shrinking(plan.model, layers, plan.text), home, silent)


def test_text_is_needed(home: Home, plan: Shrinking, tmp_path: Path) -> None:
    empty, one = tmp_path / "empty.txt", tmp_path / "one.md"
    empty.write_text("\n \n\n")
    one.write_text("What a court is.")
    for path, said in (
        (empty, "no text"),
        (one, "too few"),
        (tmp_path / "x.txt", "read"),
        (tmp_path / "y.jsonl", "exist"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            shrink(Shrinking(plan.model, 2, (path,)), home, silent)


def test_a_model_of_another_base_is_refused(home: Home, deep: CachedModel, tmp_path: Path) -> None:
    version = stored(home, tmp_path / "other", Shrunk("LlamaForCausalLM:other", (0,)))
    with pytest.raises(ArtifactCorrupt, match="was made of LlamaForCausalLM:other"):
        open_shrunk(version, deep, home.artifacts, home.models)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "file").write_text("")
    with pytest.raises(ArtifactCorrupt, match="not a shrunk model"):
        open_shrunk(home.artifacts.put(tmp_path / "none"), deep, home.artifacts, home.models)


def test_a_derived_model_is_made_once_and_whole_or_not_at_all(tmp_path: Path, deep: CachedModel) -> None:
    cache, built = ModelCache(tmp_path / "models"), []

    def build(folder: Path) -> None:
        folder.mkdir()
        built.append(folder)
        for file in ("config.json", "model.safetensors"):
            (folder / file).write_bytes((deep.folder / file).read_bytes())

    def fail(folder: Path) -> None:
        build(folder)
        raise Killed

    with pytest.raises(Killed):
        cache.derive("small", "artifact:1", fail)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["small.lock"]
    first = cache.derive("small", "artifact:1", build)
    assert cache.derive("small", "artifact:1", fail) == first
    assert len(built) == 2
    assert first.folder == tmp_path / "models" / "small"
    assert (first.name, first.architecture) == ("artifact:1", deep.architecture)
    assert cache.derive("smaller", "artifact:2", build).identity != first.identity


@pytest.mark.parametrize("error", [OSError(errno.EDQUOT, "Disk quota exceeded"), SafetensorError(FULL)])
def test_a_full_disk_says_so(tmp_path: Path, error: Exception) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        raise error

    with pytest.raises(NoSpace, match="full"):
        ModelCache(tmp_path / "models").derive("small", "artifact:1", fail)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["small.lock"]


def test_a_model_of_another_kind_is_refused(home: Home, plan: Shrinking, deep: CachedModel, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(deep.folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel"):
        shrink(replace(plan, model=str(other)), home, silent)


def test_the_command_prints_the_name_of_what_it_made(home: Home, plan: Shrinking, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(cli_models.shrink)
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"The {word} and the {word}s of {domain}." for domain, words in WORDS.items() for word in words)
    )
    options = [
        plan.model,
        "--layers",
        "3",
        "--text",
        str(text),
        "--test",
        str(plan.text[0]),
        "--steps",
        "1",
        "--rank",
        "2",
    ]
    runner, environment = CliRunner(), {"COLLEGIUM_HOME": str(home.root), "COLLEGIUM_DEVICE": "cpu"}
    shown = runner.invoke(app, options, env=environment, catch_exceptions=False).stdout.splitlines()
    assert shown[0].startswith("Kept the layers ")
    assert shown[-1].startswith(ARTIFACT)
    again = json.loads(runner.invoke(app, [*options, "--json"], env=environment, catch_exceptions=False).stdout)
    assert again["name"] == shown[-1]
    assert (home.artifacts.path(shown[-1].removeprefix(ARTIFACT)) / ADAPTER / WEIGHTS).is_file()
