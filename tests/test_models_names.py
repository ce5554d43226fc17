from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import InvalidRequest
from collegium.models.names import ModelName, parse_name
from collegium.settings import DEFAULT_BASE, DEFAULT_ENCODER


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pypi:some-model==1.0/pkg/model", ModelName("pypi", "some-model", "1.0", PurePosixPath("pkg/model"))),
        ("pypi:a==1.0+local.1/x.gguf", ModelName("pypi", "a", "1.0+local.1", PurePosixPath("x.gguf"))),
        ("hf:org/name", ModelName("hf", "org/name")),
        ("hf:org/na.me-1@v1.0", ModelName("hf", "org/na.me-1", "v1.0")),
        ("hf:org/name@refs/pr/1", ModelName("hf", "org/name", "refs/pr/1")),
    ],
)
def test_the_forms_of_a_name(text: str, expected: ModelName) -> None:
    assert parse_name(text) == expected


@pytest.mark.parametrize("text", [DEFAULT_BASE, DEFAULT_ENCODER])
def test_the_defaults_are_names(text: str) -> None:
    assert parse_name(text).source == "pypi"


def test_a_folder_is_a_name_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = ModelName("folder", str((tmp_path / "model").resolve()))
    for text in ("model", "./model/", "~/model", str(tmp_path / "model")):
        assert parse_name(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gpt2",
        "hf:name",
        "hf:a/b/c",
        "pypi:package/path",
        "pypi:package==1.0",
        "pypi:package==1.0/",
        "pypi:package==1.0//etc",
        "pypi:package==1.0/../../etc",
        "pypi:--index-url==1.0/x",
        "https://example.org/model.safetensors",
        "/no/such/folder",
    ],
)
def test_anything_else_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is not the name of a model") as caught:
        parse_name(text)
    assert caught.value.hint
    for form in ("hf:org/name", "pypi:package==version/path", "folder"):
        assert form in caught.value.hint


names = st.from_regex(r"pypi:[A-Za-z0-9][A-Za-z0-9._-]*==[0-9.]+/[a-z.]{1,8}(/[a-z._-]{1,8}){0,3}", fullmatch=True)


@given(names)
def test_a_slug_stays_in_the_cache(text: str) -> None:
    try:
        slug = parse_name(text).slug
    except InvalidRequest:
        return
    assert PurePosixPath(slug).name == slug
    assert slug not in (".", "..")
    assert slug


def test_different_names_have_different_slugs() -> None:
    texts = ["hf:a/b", "hf:a/b@c", "hf:a/b-c", "pypi:a==1/b", "pypi:a==1/b/c", "pypi:a==1/b-c", "hf:a-b/c"]
    assert len({parse_name(text).slug for text in texts}) == len(texts)
