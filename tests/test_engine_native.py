"""Kernels are compiled once, kept where nobody else can write, and never loaded half."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from collegium.errors import ModelUnavailable
from collegium.experts.engine import native
from collegium.experts.engine.load import load_decoder
from collegium.models.cache import CachedModel
from collegium.tests.engine_models import tiny_lm

COMPILER = next((path for name in native.COMPILERS if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
Compiler = Callable[[str], None]


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small source in place of the real one, and a cache and a folder for temporary files of the test's own."""
    path = tmp_path / "small.c"
    path.write_text("int answer(void) { return 42; }")
    monkeypatch.setattr(native, "SOURCE", path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    native.library.cache_clear()
    yield path
    native.library.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """A function that puts a `cc` on the PATH that does what a shell script says where it is not asked for its version."""
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)

    def install(script: str) -> None:
        (tools / "cc").write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n')
        (tools / "cc").chmod(0o755)
        native.library.cache_clear()

    return install


@pytest.fixture
def compiled(compiler: Compiler, tmp_path: Path) -> Callable[[], int]:
    """A function that says how often something was compiled."""
    compiler(f'echo >> "{tmp_path}/compiled"; exec {COMPILER} "$@"')
    (tmp_path / "compiled").touch()
    return lambda: (tmp_path / "compiled").read_text().count("\n")


def answer() -> int:
    native.library.cache_clear()
    return int(native.library().answer())


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/collegium/kernels").iterdir())


def test_it_is_compiled_once(source: Path, tmp_path: Path, compiled: Callable[[], int]) -> None:
    assert (answer(), answer(), compiled()) == (42, 42, 1)
    assert (tmp_path / "cache/collegium/kernels").stat().st_mode & 0o777 == 0o700
    source.write_text("int answer(void) { return 43; }")
    assert (answer(), answer(), compiled()) == (43, 43, 2)
    assert len(kept(tmp_path)) == 2


def test_what_is_not_whole_is_compiled_again(tmp_path: Path, compiled: Callable[[], int]) -> None:
    """A power cut may leave a file without its last pages, and loading that would kill the process."""
    answer()
    (path,) = kept(tmp_path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:1000], whole[:-1], whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]):
        path.unlink()  # it is in use
        path.write_bytes(damaged)
        before = compiled()
        assert (answer(), compiled()) == (42, before + 1)
        assert kept(tmp_path) == [path]
        assert path.read_bytes() == whole


def test_processes_that_compile_at_once(tmp_path: Path, source: Path, compiled: Callable[[], int]) -> None:
    code = "import sys; from pathlib import Path; from collegium.experts.engine import native\n"
    code += "native.SOURCE = Path(sys.argv[1]); print(native.library().answer())"
    command = [sys.executable, "-c", code, str(source)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [one.communicate(timeout=60)[0].strip() for one in running] == ["42"] * 3
    before = compiled()
    assert (answer(), compiled()) == (42, before)
    assert all(path.suffix == ".so" for path in kept(tmp_path)), "temporary folders are gone"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo first >&2; echo 'small.c:1: error: out of luck' >&2; exit 1", r"compiled: first .*out of luck\. "),
        ("exit 3", r"cc ended with 3\. "),
        ("exit 0", r"No such file"),
        ("exec sleep 20", r"timed out"),
    ],
)
def test_a_compiler_that_fails(
    script: str, words: str, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler(script)
    monkeypatch.setattr(native, "SECONDS", 0.5)
    with pytest.raises(ModelUnavailable, match=words) as caught:
        native.library()
    assert "Install gcc" in str(caught.value.hint)
    assert kept(tmp_path) == []


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelUnavailable, match="no C compiler"):
        native.library()


def test_something_else_that_is_named_like_one(compiler: Compiler, tmp_path: Path) -> None:
    compiler("")
    (tmp_path / "bin/cc").write_bytes(b"\x7fELF nonsense")
    with pytest.raises(ModelUnavailable, match="could not be compiled"):
        native.library()


def test_without_int8_the_model_runs_as_floats(
    compiler: Compiler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    compiler("echo out of luck >&2; exit 1")
    model = CachedModel("tiny", tiny_lm(tmp_path / "tiny"), "LlamaForCausalLM", "tiny@1")
    with pytest.raises(ModelUnavailable, match="out of luck"):
        load_decoder(model, precision="int8", device=torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        decoder = load_decoder(model, precision="auto", device=torch.device("cpu"))
    assert decoder.precision in ("float32", "bfloat16")
    assert "out of luck" in caplog.text


def others_may_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.chmod(0o777)


def somebody_elses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: folder.stat().st_uid + 1)


def no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("a file")


@pytest.mark.parametrize("spoil", [others_may_write, somebody_elses, no_folder])
def test_a_cache_that_cannot_be_used_is_left_alone(
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
    tmp_path: Path,
    source: Path,
    compiled: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Above all, nothing is loaded that somebody else may have put there."""
    answer()
    (path,) = kept(tmp_path)
    folder = path.parent
    source.write_text("int answer(void) { return 43; }")
    answer()
    for found in kept(tmp_path):
        found.unlink()  # it is in use
        found.write_bytes(b"planted")
    spoil(folder, monkeypatch)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert answer() == 43
    assert compiled() == 4
    assert caplog.text.count("compiled at every start") == 2
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_real_kernels_compile_without_a_word() -> None:
    real = Path(native.__file__).parent / "int8.c"
    assert COMPILER is not None
    command = [COMPILER, *native.FLAGS, "-O0", "-Wall", "-Wextra", "-Wcast-qual", "-Wshadow", "-Werror"]
    subprocess.run([*command, "-fsyntax-only", str(real)], check=True, timeout=60)
