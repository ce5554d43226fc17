"""The documentation agrees with the code: tables, links, pages that are generated, blocks and programs that run."""

from __future__ import annotations

import ast
import dataclasses
import re
import runpy
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from collegium.settings import Settings

if TYPE_CHECKING:
    from collegium.runtime import Collegium

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")])
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PACKAGES = [ROOT.joinpath(*name.split(".")[1:]) for name in PROJECT["tool"]["setuptools"]["packages"]]
MODULES = sorted(path for package in PACKAGES for path in package.glob("*.py"))
COMES_WITH = {"starlette", "scipy", "tokenizers"}  # with FastAPI, scikit-learn, transformers
IMPORTED_AS = {"scikit-learn": "sklearn", "faiss-cpu": "faiss", "pyyaml": "yaml"}
MOST_SENTENCES = 6


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page; `title` is what stands after the language."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    text = (DOCS / page).read_text("utf-8")
    found = re.finditer(r"^```(\w+) ?([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(one[1], one[2], one[3], text[: one.start()].count("\n") + 2) for one in found]


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    text = (DOCS / page).read_text("utf-8")
    assert f"\n{heading}\n" in text
    table = re.search(r"^\|.*?(?=\n\n|\Z)", text.partition(f"\n{heading}\n")[2], re.MULTILINE | re.DOTALL)
    assert table
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table[0].splitlines()[2:]]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8"))
    local = [link for link in links if not link.startswith("http")]
    missing = [link for link in local if not (page.parent / link.partition("#")[0]).exists()]
    assert missing == []


def test_the_index_names_every_page() -> None:
    linked = re.findall(r"\]\((\w+\.md)\)", (DOCS / "README.md").read_text("utf-8"))
    assert sorted(linked) == sorted(page.name for page in DOCS.glob("*.md") if page.name != "README.md")


def test_the_page_of_commands_is_up_to_date() -> None:
    page = runpy.run_path(str(DOCS / "generate.py"))["page"]
    assert (DOCS / "commands.md").read_text("utf-8") == page(), "run `python docs/generate.py`"


@pytest.mark.parametrize(
    ("heading", "declared"),
    [
        ("## At run time", PROJECT["project"]["dependencies"]),
        *(
            (f"## For {word}: `pip install 'collegium[{extra}]'`", PROJECT["project"]["optional-dependencies"][extra])
            for word, extra in (("training", "train"), ("development", "dev"))
        ),
    ],
)
def test_every_dependency_has_its_reason(heading: str, declared: list[str]) -> None:
    table = rows("dependencies.md", heading)
    assert [code(cells[0])[0] for cells in table] == [_package(requirement) for requirement in declared]
    assert all(len(cells) == 3 and all(cells) for cells in table)


def _package(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement)[0]


def test_installed_code_imports_only_what_is_declared() -> None:
    serving = _modules(PROJECT["project"]["dependencies"]) | COMES_WITH | set(sys.stdlib_module_names)
    training = serving | _modules(PROJECT["project"]["optional-dependencies"]["train"])
    undeclared = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in MODULES
        for name in _absolute_imports(path)
        if name not in (training if _part(path) == "training" else serving)
    ]
    assert undeclared == []


def _modules(requirements: Iterable[str]) -> set[str]:
    return {IMPORTED_AS.get(name, name).replace("-", "_") for name in map(_package, requirements)}


def _absolute_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


def test_layers_are_as_the_page_says() -> None:
    allowed = {code(cells[0])[0]: set(code(cells[1])) for cells in rows("architecture.md", "## Layers")}
    found: dict[str, set[str]] = {part: set() for part in allowed}
    for path in MODULES:
        if path != ROOT / "__init__.py":
            part = _part(path)
            found.setdefault(part, set()).update(set(_relative_imports(path)) - {part})
    assert found == allowed


def _part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _relative_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = path.parents[node.level - 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (_part(package.joinpath(*name.split("."))) for name in names)


def test_every_file_is_in_the_table_of_files() -> None:
    named = {name for cells in rows("architecture.md", "## Files") for name in code(cells[0])}
    sources = [*MODULES, *(path for package in PACKAGES for path in package.glob("*.c"))]
    files = {path.relative_to(ROOT).as_posix() for path in sources if path.name != "__init__.py"}
    migrations = {name for name in files if name.startswith("experts/migrations/")}
    assert named == files - migrations | {"experts/migrations/"}


def test_questions_of_the_faq_stand_by_themselves() -> None:
    questions = (DOCS / "faq.md").read_text("utf-8").split("\n## ")[1:]
    headings = [question.partition("\n")[0] for question in questions]
    assert len(set(headings)) == len(headings)
    assert [heading for heading in headings if not heading.endswith("?")] == []
    for question in questions:
        answer = " ".join(question.partition("\n")[2].split())
        assert 2 <= len(re.findall(r"[.:](?= [A-Z`]|$)", answer)) <= MOST_SENTENCES, answer
        assert not re.match(r"(It|This|That|They|These|He|She)\b", answer), answer


def test_fields_of_rows_are_those_that_are_read() -> None:
    from collegium.router.build import LabelledPrompt
    from collegium.training.rows.examples import Example
    from collegium.training.rows.wording import Wording

    examples = rows("examples.md", "## Examples, to train an expert")
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(Example)}
    given = {"id", "source"}  # without a default, but made up from the file's name
    assert {code(cells[0])[0]: cells[1] == "yes" for cells in examples} == {
        name: required and name not in given for name, required in fields.items()
    }
    prompts = rows("examples.md", "## Router rows, to fit the router anew")
    assert {code(cells[0])[0] for cells in prompts} == {one.name for one in dataclasses.fields(LabelledPrompt)} - {"id"}
    wordings = rows("examples.md", "### How a row is put to the model")
    assert {code(cells[0])[0] for cells in wordings} == {one.name for one in dataclasses.fields(Wording)}


def test_rows_of_the_page_can_be_read(tmp_path: Path) -> None:
    from collegium.router.build import read_labelled
    from collegium.training.rows.examples import read_examples
    from collegium.training.rows.wording import ask

    examples, prompts = (block.text for block in blocks("examples.md") if block.language == "json")
    (tmp_path / "examples.jsonl").write_text(examples, "utf-8")
    (tmp_path / "prompts.jsonl").write_text(prompts, "utf-8")
    read = read_examples([tmp_path / "examples.jsonl"])
    assert [bool(row.choices) for row in read] == [False, True, False]
    assert "fair, unfair" in ask(read[1])
    assert read[2].context in ask(read[2])
    assert [row.domain for row in read_labelled(tmp_path / "prompts.jsonl")] == ["law"]


EXTENDING = blocks("extending.md")


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_settings: Settings) -> Iterator[None]:
    """The packages of extending.md, installed with their entry points, and a home to use them in."""
    folder = tmp_path / "site"
    for block in EXTENDING:
        if block.title:
            folder.mkdir(exist_ok=True)
            (folder / block.title).write_text(block.text, "utf-8")
    groups = [tomllib.loads(block.text)["project"]["entry-points"] for block in EXTENDING if block.language == "toml"]
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
        for group in groups
        for name, entries in group.items()
    ]
    about = folder / "collegium_plugins-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: collegium-plugins\nVersion: 1.0\n", "utf-8")
    (about / "entry_points.txt").write_text("\n".join(lines), "utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("COLLEGIUM_HOME", str(fresh_settings.home))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("collegium_"):
            del sys.modules[name]


@pytest.mark.parametrize(
    "block",
    [block for block in EXTENDING if block.language == "python" and not block.title],
    ids=lambda block: f"line {block.line}",
)
def test_blocks_of_extending_run(block: Block, plugins: None) -> None:
    source = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's line
    exec(compile(source, DOCS / "extending.md", "exec", dont_inherit=True), {"__name__": "block"})


def test_the_example_in_process_runs(
    tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLLEGIUM_HOME", str(tiny_settings.home))
    runpy.run_path(str(ROOT / "examples" / "ask.py"))["main"]("explain the contract of the plaintiff")
    assert re.search(
        r"^law \(routed, .*^law@[0-9a-f]{12}, \d+ tokens", capsys.readouterr().out, re.DOTALL | re.MULTILINE
    )


def test_the_example_of_a_client_runs(collegium: Collegium, capsys: pytest.CaptureFixture[str]) -> None:
    import socket
    import threading
    import time

    import uvicorn

    from collegium.service import create_app

    server = uvicorn.Server(uvicorn.Config(create_app(collegium=collegium), ws="none", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        try:
            runpy.run_path(str(ROOT / "examples" / "openai_client.py"))["main"](
                "explain the contract of the plaintiff", url
            )
        finally:
            server.should_exit = True
            thread.join()
    shown = capsys.readouterr().out
    assert shown.startswith("models: auto, ")
    assert "(routed): " in shown
