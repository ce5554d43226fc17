"""The router is fitted anew from rows, with its encoder tuned or as it is, and refitted on what it has stored."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from collegium.errors import InvalidRequest
from collegium.experts.home import Home
from collegium.router.artifact import RouterArtifact
from collegium.router.build import (
    ROWS_PER_SOURCE,
    LabelledPrompt,
    build_router,
    read_labelled,
    read_pair,
    some_of_each_source,
)
from collegium.router.encoder import Encoders
from collegium.router.rows import BACKGROUND
from collegium.runtime import Collegium
from collegium.settings import Settings
from collegium.training.domain import NewDomain
from collegium.training.register import register
from collegium.training.routing.fit_router import fit, refit
from collegium.training.routing.tune_encoder import Tuning

WORDS = {
    "law": ["court", "contract", "judge", "lawsuit", "statute"],
    "code": ["python", "function", "compiler", "loop", "bug"],
    "health": ["doctor", "fever", "vaccine", "symptom", "pain"],
    BACKGROUND: ["banana", "river", "guitar", "violin", "mountain"],
}


def written(path: Path, sentences: Sequence[str], source: str, *, without: Sequence[str] = ()) -> Path:
    rows = [
        {"text": sentence.format(one, other), "domain": domain, "source": f"{source}-{domain or 'none'}"}
        for domain, words in WORDS.items()
        for sentence in sentences
        for one in words
        for other in words
        if domain not in without
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def training(tmp_path: Path) -> Path:
    return written(tmp_path / "train.jsonl", ["what is a {0} and a {1}", "explain the {0}"], "train")


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return written(tmp_path / "dev.jsonl", ["how does a {0} differ from a {1}"], "dev", without=[BACKGROUND])


@pytest.fixture
def home(fresh_settings: Settings) -> Iterator[Home]:
    with Home(fresh_settings) as opened:
        yield opened


def silent(what: str, done: int, of: int) -> None:
    pass


def live(home: Home) -> RouterArtifact:
    return RouterArtifact.load(home.artifacts.verify(home.release().router))


def test_a_fit_is_live_and_says_how_good_it_is(
    home: Home, training: Path, held_out: Path, prompts: Mapping[str, str]
) -> None:
    release, accuracy = fit(home, training, held_out, silent)
    assert home.release() == release
    assert set(accuracy) == {"law/dev-law", "code/dev-code", "health/dev-health", "mean"}
    assert accuracy["mean"] > 0.6
    artifact = live(home)
    assert artifact.head.domains == ("code", "health", "law")
    assert artifact.adapter is None
    assert artifact.provenance["accuracy"] == accuracy
    assert artifact.provenance["training"]["file"] == "train.jsonl"
    assert "tuning" not in artifact.provenance
    assert set(artifact.rows.texts) == {None}
    sources = set(zip(artifact.rows.domains, artifact.rows.sources, strict=True))
    assert {("law", "train-law"), ("law", "own/queries"), (BACKGROUND, "train-none")} < sources
    assert not {domain for domain, _ in sources} & {"finance", "math"}  # own prompts of domains that are not fitted
    assert not any("dev-" in source for _, source in sources)
    with Collegium.open(home.settings) as opened:
        chances = opened.route(prompts["law"]).probabilities
        assert max(chances, key=lambda domain: chances[domain]) == "law"


def test_a_tuned_encoder_goes_with_the_router(home: Home, training: Path, held_out: Path) -> None:
    told: set[str] = set()
    tuning = Tuning(steps=2, batch=8, tokens=32, rank=2)
    fit(home, training, held_out, lambda what, done, of: told.add(what), tuning)
    artifact = live(home)
    assert artifact.adapter is not None
    assert artifact.adapter.parent == home.artifacts.path(home.release().router)
    assert artifact.encoder.startswith("BertModel:")
    assert "+" in artifact.encoder
    assert artifact.provenance["tuning"].items() >= {"steps": 2, "rank": 2, "batch": 8}.items()
    assert {"tuning the encoder", "embedding", "fitting"} <= told
    about = json.dumps(artifact.provenance) + (artifact.adapter / "adapter_config.json").read_text("utf-8")
    assert str(home.root.parent) not in about
    assert str(home.settings.encoder) not in about
    with Collegium.open(home.settings) as opened:
        before = opened.route("the contract")
        register(home, NewDomain("music", "the guitar and the violin"), progress=silent)
        assert "music" in opened.route("the contract").probabilities
    assert live(home).adapter is not None
    assert live(home).encoder == artifact.encoder
    assert "music" not in before.probabilities


def test_a_refit_keeps_domains_that_were_added(home: Home, prompts: Mapping[str, str]) -> None:
    register(home, NewDomain("music", "the guitar and the violin", prompts=("guitar", "violin")), progress=silent)
    before, first = home.release(), live(home)
    release = refit(home)
    assert (release, release.parent) == (home.release(), before.id)
    assert release.router != before.router
    assert (release.aliases, release.indexes) == (before.aliases, before.indexes)
    after = live(home)
    assert after.head.domains == first.head.domains
    assert after.rows.texts == first.rows.texts
    with Collegium.open(home.settings) as opened:
        assert [opened.route(prompts[name]).domain for name in ("law", "code")] == ["law", "code"]
        assert opened.route("the guitar and the violin").domain == "music"
    home.registry.rollback(before.id)
    assert live(home).head.weights.tobytes() == first.head.weights.tobytes()


@pytest.mark.parametrize(
    ("rows", "said"),
    [([], "has no rows"), ([{"text": "a guitar", "domain": "music", "source": "elsewhere"}], "'music'")],
)
def test_rows_to_calibrate_on_are_of_known_domains(
    training: Path, tmp_path: Path, rows: list[dict[str, str]], said: str
) -> None:
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidRequest, match=re.escape(said)):
        read_pair(training, tmp_path / "dev.jsonl")


def test_sources_are_not_to_be_shared(training: Path, held_out: Path) -> None:
    train, dev = read_pair(training, held_out)
    assert {row.source for row in train if row.domain == "law"} > {"train-law", "own/exam", "own/questions"}
    assert {row.source for row in dev} == {"dev-law", "dev-code", "dev-health"}
    with pytest.raises(InvalidRequest, match="shares the sources train-code") as caught:
        read_pair(training, training)
    assert caught.value.hint


@pytest.mark.parametrize("write", [Path.write_bytes, lambda path, data: path.write_bytes(gzip.compress(data))])
def test_rows_are_read_plain_or_packed(tmp_path: Path, write: Callable[[Path, bytes], object]) -> None:
    packed = write is not Path.write_bytes
    file = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    row = {"text": "What is a tort?", "domain": "law", "source": "x"}
    write(file, json.dumps(row).encode() + b"\n")
    assert read_labelled(file) == [LabelledPrompt("What is a tort?", "law", "x", f"{file.name}:1")]


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[]",
        "3",
        '{"text": "a", "domain": null, "source": "x"}',
        '{"text": "a", "domain": "law"}',
        '{"text": "a", "source": "x"}',
    ],
)
def test_a_row_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "domain": "law", "source": "x"}\n' + line + "\n", "utf-8")
    with pytest.raises(InvalidRequest, match=r"rows\.jsonl, row 2") as caught:
        read_labelled(file)
    assert caught.value.hint
    with pytest.raises(InvalidRequest, match=r"nowhere\.jsonl"):
        read_labelled(tmp_path / "nowhere.jsonl")


def test_of_each_source_of_a_domain_some_rows_are_kept() -> None:
    sizes = {("law", "a"): 300, ("law", "b"): 7, ("code", "a"): 160}
    rows = [
        LabelledPrompt(f"{domain} {number}", domain, source, f"{source}:{number}")
        for (domain, source), size in sizes.items()
        for number in range(size)
    ]
    kept = some_of_each_source(rows, ROWS_PER_SOURCE)
    assert Counter((row.domain, row.source) for row in kept) == {
        key: min(size, ROWS_PER_SOURCE) for key, size in sizes.items()
    }
    assert len(set(kept)) == len(kept)
    assert kept == some_of_each_source(rows, ROWS_PER_SOURCE)


def test_a_fit_is_the_same_each_time(home: Home, training: Path, held_out: Path, tmp_path: Path) -> None:
    encoders = Encoders(home.models.get(home.settings.encoder), precision="float32", device="cpu")
    train, dev = read_labelled(training), read_labelled(held_out)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        build_router(train, dev, encoders, None, silent).save(folder)
    for name in ("router.json", "router.safetensors", "rows.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
