"""A release that was exported is the same release in another home; one that was changed on the way is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from collegium.errors import ArtifactCorrupt, CollegiumError
from collegium.experts.artifacts import ArtifactStore, tree_hash
from collegium.experts.bundle import export_release, import_release
from collegium.experts.home import Home
from collegium.experts.registry import Registry
from collegium.runtime import Collegium
from collegium.schema import ARTIFACT, Card, Combination, Lora, Plugin, Proxy, Remote, card_to_dict
from collegium.settings import Settings
from collegium.training.domain import NewDomain
from collegium.training.register import register

MakeSettings = Callable[..., Settings]
TEXT = "The guitar and the violin by the river."


@dataclass(frozen=True)
class Empty:
    """A home without a release."""

    registry: Registry
    artifacts: ArtifactStore


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Empty]:
    registry = Registry.open(f"sqlite:///{tmp_path / 'empty' / 'registry.db'}")
    yield Empty(registry, ArtifactStore(tmp_path / "empty" / "artifacts"))
    registry.close()


@pytest.fixture(scope="module")
def home(make_settings: MakeSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home with a domain of the user's own, made from a document."""
    root = tmp_path_factory.mktemp("bundle")
    (root / "song.txt").write_text(TEXT, "utf-8")
    with Home(make_settings(root / "home")) as opened:
        asked = tuple(
            f"{start} guitar and {other} violin" for start in ("is the", "the", "explain the") for other in ("a", "the")
        )
        domain = NewDomain("music", "Guitars.", (root / "song.txt",), asked)
        register(opened, domain, progress=lambda what, done, of: None)
        yield opened


@pytest.fixture(scope="module")
def exported(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that only read."""
    folder = tmp_path_factory.mktemp("exported") / "release"
    export_release(folder, home.registry, home.artifacts, home.release())
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """For tests that damage it."""
    return shutil.copytree(exported, tmp_path / "release")


def test_a_proxied_expert_comes_with_all_that_it_names(fresh_settings: Settings, empty: Empty, tmp_path: Path) -> None:
    bundle = tmp_path / "release"
    with Home(fresh_settings) as home:
        adapter, small, shown = (home.artifacts.put(_folder(tmp_path / name)) for name in ("adapter", "small", "shown"))
        learned, model = Combination("comblm", 0.5, weights=(0.0,) * 8), f"{ARTIFACT}{small}"
        proxy = Proxy(adapter, 4, large=model, small=model, combination=learned)
        remote = Remote("http://h/v1", "m", adapter, 4, small=model, combination=learned, demonstrations=shown)
        known = [Card("proxied", "", proxy, "base"), Card("remote", "", remote, "base")]
        aliases = {card.name: card.version for card in known}
        release = home.registry.publish(cards=known, aliases=aliases, note="proxied")
        export_release(bundle, home.registry, home.artifacts, release)
    take(bundle, empty)
    assert [cards(empty.registry)[card.name] for card in known] == known
    for version in (adapter, small, shown):
        assert empty.artifacts.verify(version)
    for change in ({"later": 1}, {"small": 5}, {"combination": "proxy"}, {"combination": {"weights": None}}):
        body = card_to_dict(known[1])
        body["spec"] |= change
        (bundle / "cards" / "remote.json").write_text(json.dumps(body), "utf-8")
        with pytest.raises(ArtifactCorrupt, match="not an exported release"):
            take(bundle, empty)


def _folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "file").write_text(folder.name)
    return folder


def take(folder: Path, into: Empty) -> None:
    import_release(folder, into.registry, into.artifacts, note="imported")


def cards(registry: Registry) -> Mapping[str, Card]:
    live = registry.live()
    assert live
    return {name: registry.card(version) for name, version in live.aliases.items()}


def test_what_was_exported_is_what_is_imported(home: Home, exported: Path, empty: Empty) -> None:
    release = home.release()
    imported = import_release(exported, empty.registry, empty.artifacts, note="imported")
    assert imported == empty.registry.live()
    assert (imported.aliases, imported.router, imported.indexes) == (release.aliases, release.router, release.indexes)
    assert (imported.note, imported.parent) == ("imported", None)
    assert cards(empty.registry) == home.cards(release)
    adapters = {card.spec.adapter for card in cards(empty.registry).values() if isinstance(card.spec, Lora)}
    assert len(adapters) == 2
    for version in (release.router, *release.indexes.values(), *adapters):
        assert tree_hash(empty.artifacts.verify(version)) == tree_hash(home.artifacts.verify(version)) == version


def test_a_home_that_is_seeded_with_it_answers_alike(
    home: Home, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: Mapping[str, str]
) -> None:
    monkeypatch.setattr("collegium.experts.home.SHIPPED", exported)
    settings = home.settings.model_copy(update={"home": tmp_path / "other"})
    with Collegium.open(settings) as there, Collegium.open(home.settings) as here:
        assert there.experts() == here.experts()
        for prompt in (prompts["law"], "a guitar and a violin"):
            ours, theirs = here.chat(prompt), there.chat(prompt)
            assert (ours.text, ours.decision, ours.citations) == (theirs.text, theirs.decision, theirs.citations)
        assert theirs.citations[0].text == TEXT


def test_it_holds_what_the_release_names_and_nothing_else(home: Home, exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {"release.json", "cards", "artifacts"}
    assert {path.stem for path in (exported / "cards").iterdir()} == {"base", "law", "code", "music"}
    stored = {path.name for path in home.artifacts.root.iterdir()}
    named = {path.name for path in (exported / "artifacts").iterdir()}
    assert len(named) == 4, "two adapters, an index, a router"
    assert len(stored) == 5, "the router before is in the home, not in the release"
    assert named < stored


def test_equal_releases_give_equal_folders(home: Home, exported: Path, tmp_path: Path) -> None:
    export_release(tmp_path / "again", home.registry, home.artifacts, home.release())
    assert tree_hash(tmp_path / "again") == tree_hash(exported)


def test_an_earlier_export_is_replaced(home: Home, bundle: Path, exported: Path) -> None:
    (bundle / "cards" / "gone.json").write_text("{}", "utf-8")
    export_release(bundle, home.registry, home.artifacts, home.release())
    assert tree_hash(bundle) == tree_hash(exported)
    assert [path.name for path in bundle.parent.iterdir() if path.name.startswith(".")] == []


def test_an_earlier_release_can_be_exported(home: Home, tmp_path: Path, empty: Empty) -> None:
    first = home.registry.releases()[-1]
    export_release(tmp_path / "first", home.registry, home.artifacts, first)
    take(tmp_path / "first", empty)
    assert set(cards(empty.registry)) == {"base", "law", "code"}


def test_what_a_plug_in_needs_is_taken_along(fresh_settings: Settings, tmp_path: Path, empty: Empty) -> None:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "rules.json").write_text("{}", "utf-8")
    with Home(fresh_settings) as home:
        rules = home.artifacts.put(tmp_path / "rules")
        card = Card("oracle", "future", Plugin("oracle", {"depth": 3}, (rules,)), "some base")
        home.registry.publish(cards=[card], aliases={"oracle": card.version}, note="a plug-in")
        export_release(tmp_path / "release", home.registry, home.artifacts, home.release())
    take(tmp_path / "release", empty)
    assert cards(empty.registry)["oracle"] == card
    assert (empty.artifacts.verify(rules) / "rules.json").read_text("utf-8") == "{}"


def artifact(folder: Path, file: str) -> Path:
    (found,) = folder.glob(f"artifacts/*/{file}")
    return found


def test_a_changed_file_is_named_by_its_artifact(bundle: Path, empty: Empty) -> None:
    changed = artifact(bundle, "index.faiss")
    changed.write_bytes(changed.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ArtifactCorrupt) as caught:
        take(bundle, empty)
    assert changed.parent.name in caught.value.message
    assert caught.value.hint
    assert empty.registry.live() is None


def remove_artifact(bundle: Path) -> None:
    shutil.rmtree(artifact(bundle, "index.faiss").parent)


def remove_artifacts(bundle: Path) -> None:
    shutil.rmtree(bundle / "artifacts")


def remove_card(bundle: Path) -> None:
    (bundle / "cards" / "law.json").unlink()


def cut_card(bundle: Path) -> None:
    path = bundle / "cards" / "law.json"
    path.write_text(path.read_text("utf-8")[:40], "utf-8")


def change_card(bundle: Path) -> None:
    path = bundle / "cards" / "law.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "system": "Obey."}), "utf-8")


def forget_router(bundle: Path) -> None:
    path = bundle / "release.json"
    body = json.loads(path.read_text("utf-8"))
    del body["router"]
    path.write_text(json.dumps(body), "utf-8")


def cut_release(bundle: Path) -> None:
    (bundle / "release.json").write_text('{"aliases": {', "utf-8")


def empty_release(bundle: Path) -> None:
    (bundle / "release.json").write_text("[]", "utf-8")


def remove_release(bundle: Path) -> None:
    (bundle / "release.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        remove_artifact,
        remove_artifacts,
        remove_card,
        change_card,
        cut_card,
        cut_release,
        forget_router,
        empty_release,
        remove_release,
    ],
)
def test_a_damaged_release_is_refused_and_nothing_published(
    bundle: Path, empty: Empty, damage: Callable[[Path], None]
) -> None:
    damage(bundle)
    with pytest.raises(CollegiumError) as caught:
        take(bundle, empty)
    assert caught.value.hint
    assert empty.registry.live() is None


def test_a_folder_that_is_no_release_is_refused(tmp_path: Path, empty: Empty) -> None:
    with pytest.raises(ArtifactCorrupt, match="nowhere"):
        take(tmp_path / "nowhere", empty)


def test_a_damaged_artifact_is_not_exported(fresh_settings: Settings, bundle: Path, exported: Path) -> None:
    with Home(fresh_settings) as home:
        path = home.artifacts.path(home.release().router) / "rows.json"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ArtifactCorrupt, match=r"rows\.json"):
            export_release(bundle, home.registry, home.artifacts, home.release())
    assert tree_hash(bundle) == tree_hash(exported), "the earlier export is still there"


@pytest.mark.parametrize("target", ["thesis", "thesis/chapter", "..", "."])
def test_a_folder_of_something_else_is_never_replaced(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    chapters = [tmp_path / "outer" / "inner" / "thesis" / "chapter", tmp_path / "outer" / "chapter"]
    for chapter in chapters:
        chapter.parent.mkdir(parents=True, exist_ok=True)
        chapter.write_text("years of work", "utf-8")
    monkeypatch.chdir(tmp_path / "outer" / "inner")
    with pytest.raises(CollegiumError) as caught:
        export_release(Path(target), home.registry, home.artifacts, home.release())
    assert caught.value.hint
    assert [chapter.read_text("utf-8") for chapter in chapters] == ["years of work"] * 2


def test_an_empty_folder_is_filled(home: Home, tmp_path: Path, exported: Path) -> None:
    (tmp_path / "new").mkdir()
    export_release(tmp_path / "new", home.registry, home.artifacts, home.release())
    export_release(tmp_path / "deep" / "er", home.registry, home.artifacts, home.release())
    assert tree_hash(tmp_path / "new") == tree_hash(tmp_path / "deep" / "er") == tree_hash(exported)
