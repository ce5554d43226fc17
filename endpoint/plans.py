"""A training plan that comes over HTTP. Its data is written beside the job, or lies in the folder that settings open."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from ..errors import InvalidRequest
from ..models.space import space_for
from ..settings import Settings

GIVEN = "given"
"""The folder, in a job's own, of what came with the request."""
FILES = ("examples", "test", "general", "questions")
"""Fields whose rows become one file each; documents become a file each."""


def _file_name(name: str) -> str:
    if not name or not name.isprintable() or name != Path(name).name or name.startswith("."):
        raise ValueError("is no plain file name")
    if len(name.encode("utf-8", "replace")) > 200:  # noqa: PLR2004  # file systems take 255 bytes
        raise ValueError("is longer than 200 bytes")
    return name


class DocumentBody(BaseModel):
    """A document: its `name`, which citations show, such as `lease.md`, and its text."""

    name: Annotated[str, AfterValidator(_file_name)]
    text: str


Rows = list[str | dict[str, Any]]
ROWS = "Rows, as docs/examples.md has them; or names of files in the setting data_folder."


class PlanBody(BaseModel):
    """What to train, from what, and how; each field as the option of `collegium train`."""

    name: str = Field(description="Name of the expert.")
    examples: Rows = Field(default=[], description=ROWS)
    test: Rows = Field(default=[], description=f"To measure with; without them, a tenth of the examples. {ROWS}")
    general: Rows = Field(default=[], description=f"General chat to mix in. {ROWS}")
    questions: Rows = Field(default=[], description=f"Prompts of the domain, for the router. {ROWS}")
    docs: list[str | DocumentBody] = Field(
        default=[], description="Documents; or names of files and folders in the setting data_folder."
    )
    domain: str = ""
    description: str = ""
    recipe: str = ""
    options: dict[str, Any] = {}
    licence: str = ""
    limit: int | None = Field(default=None, ge=1)
    test_limit: int = Field(default=100, ge=1)
    seed: int = Field(default=17, ge=0, le=2**31 - 1)
    mine: int = Field(default=200, ge=0)
    keep_suspects: bool = False
    force: bool = False

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        """A field that is misspelt would change nothing, hours later."""
        if isinstance(values, dict) and (
            unknown := sorted(str(one)[:40] for one in set(values) - set(cls.model_fields))
        ):
            raise ValueError(f"there is no {', '.join(unknown)}; known: {', '.join(cls.model_fields)}")
        return values


class JobRequest(BaseModel):
    """A job to do."""

    kind: Literal["train"] = "train"
    plan: PlanBody


def stored_plan(body: PlanBody, settings: Settings, folder: Path) -> dict[str, Any]:
    """The plan with paths: what came along lies below `folder` then, safely on the disk.

    Raises InvalidRequest where a row is no example, or a file is named that lies elsewhere; NoSpace.
    """
    from ..training.rows.examples import read_examples

    plan = body.model_dump()
    given = folder / GIVEN
    with space_for(given):
        for field in FILES:
            rows = [one for one in plan[field] if isinstance(one, dict)]
            plan[field] = [str(_looked_up(one, settings)) for one in plan[field] if isinstance(one, str)]
            if rows:
                path = given / f"{field}.jsonl"
                _write(path, "".join(json.dumps(row) + "\n" for row in rows))
                plan[field].append(str(path))
        documents = [one for one in body.docs if isinstance(one, DocumentBody)]
        plan["docs"] = [str(_looked_up(one, settings, folders=True)) for one in body.docs if isinstance(one, str)]
        if documents:
            _write_documents(documents, given / "docs")
            plan["docs"].append(str(given / "docs"))
    try:
        for field in ("examples", "test", "general"):
            read_examples([Path(path) for path in plan[field] if Path(path).parent == given])
    except InvalidRequest as error:  # where it lies here is nobody's business
        raise InvalidRequest(error.message.replace(f"{given}{os.sep}", ""), hint=error.hint) from None
    return plan


def _looked_up(name: str, settings: Settings, *, folders: bool = False) -> Path:
    """The file (or folder) of this name in the data folder. Links are followed, and may not lead out of it."""
    if settings.data_folder is None:
        raise InvalidRequest(
            "The server opens no folder to training plans.",
            hint="Send rows and documents themselves, or set data_folder on the server.",
        )
    root = settings.data_folder.expanduser().resolve()
    try:
        path = (root / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # missing, a null character, a link to itself
        path = None
    # Nobody learns by asking what exists elsewhere.
    fits = path is not None and path.is_relative_to(root) and (path.is_file() or (folders and path.is_dir()))
    if path is None or not fits:
        raise InvalidRequest(f"There is no {name[:100]!r} in the server's data_folder.")
    return path


def _write_documents(documents: list[DocumentBody], folder: Path) -> None:
    seen: set[str] = set()
    for document in documents:
        if document.name.casefold() in seen:
            raise InvalidRequest(f"Two documents are named {document.name!r}.")
        seen.add(document.name.casefold())
        _write(folder / document.name, document.text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(text.encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())
