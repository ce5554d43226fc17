from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import collegium

ROOT = Path(__file__).parent.parent
NOT_SHIPPED = {"tests", "benchmarks", "docs", "examples", "build", "dist"}
SHIPPED = {".c", ".yaml", ".mako", ".typed", ".jinja", ".ini"}
MODEL_LIBRARIES = {"torch", "transformers", "faiss", "sklearn", "peft", "alembic", "huggingface_hub"}
HEAVY = MODEL_LIBRARIES | {"sqlalchemy", "fastapi", "numpy"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def sources() -> list[Path]:
    """The package's own modules, relative to the root."""
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return [path for path in found if not any(part in NOT_SHIPPED or part.startswith(".") for part in path.parts)]


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    folders = {path.parent for path in sources() if path.name == "__init__.py"}
    names = sorted(".".join(("collegium", *folder.parts)) for folder in folders)
    assert sorted(project["tool"]["setuptools"]["packages"]) == names


def test_every_folder_of_modules_is_a_package() -> None:
    assert [path for path in sources() if not (ROOT / path.parent / "__init__.py").exists()] == []


def test_no_module_at_the_root_shadows_another() -> None:
    """With the repository as the current folder, `python -m` would import it instead of the real one."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    installed = {
        name
        for name, owners in metadata.packages_distributions().items()
        if any(owner != "collegium" for owner in owners)
    }
    assert ours & (set(sys.stdlib_module_names) | installed) - {"__init__"} == set()


def test_what_is_not_python_is_shipped_too(project: dict[str, Any]) -> None:
    """Files that modules read at run time are in the wheel only where package-data says so."""
    listed = project["tool"]["setuptools"]["package-data"]
    for package in project["tool"]["setuptools"]["packages"]:
        folder = ROOT.joinpath(*package.split(".")[1:])
        folders = [folder, *(path for path in folder.iterdir() if package != "collegium" and _is_plain(path))]
        data = {path for each in folders for path in each.iterdir() if path.suffix in SHIPPED}
        matched = {path for pattern in listed.get(package, ()) for path in folder.glob(pattern)}
        if package != "collegium":
            assert data <= matched, package
        else:
            assert ROOT / "py.typed" in matched
    assert (ROOT / "py.typed").exists()


def _is_plain(path: Path) -> bool:
    """A folder that is no package, so its files belong to the one around it."""
    return path.is_dir() and not (path / "__init__.py").exists()


def test_the_names_that_are_promised_are_there() -> None:
    for name in collegium.__all__:
        assert getattr(collegium, name).__name__ == name
    with pytest.raises(AttributeError, match="nobody"):
        _ = collegium.nobody


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import collegium; collegium.Settings.load({})", HEAVY),
        ("import collegium.cli", HEAVY),
        ("from collegium import Collegium", MODEL_LIBRARIES),
        ("import collegium.router.router, collegium.experts.kinds, collegium.models.cache", MODEL_LIBRARIES),
        ("import collegium.models.encoder, collegium.models.load, collegium.retrieval", MODEL_LIBRARIES),
    ],
)
def test_importing_does_nothing_heavy(statement: str, heavy: set[str]) -> None:
    code = f"import json, sys; {statement}; print(json.dumps([name.split('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(json.loads(done.stdout))
    assert "collegium" in loaded
    assert loaded & heavy == set()


def test_every_dependency_is_installed_in_a_version_that_is_allowed(project: dict[str, Any]) -> None:
    from packaging.requirements import Requirement

    for text in project["project"]["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(metadata.version(requirement.name)), text
