"""What to train: a plan, which a job keeps and a process of its own works off."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest
from ..models.cache import CachedModel, sha256
from ..schema import digest

FILES = ("examples", "test", "general", "docs", "questions")
"""The fields of a plan that are files."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to train, from which files, and how.

    `docs` are what the domain answers from and `questions` prompts that belong to it; `general` is chat that is mixed in.
    `limit` is the rows taken of each examples file, `test_limit` of each test file; `mine` the question-answer pairs that are
    made of the documents, at most. Without a `recipe` it is chosen by what there is. `keep_suspects` trains on rows too that
    look planted, `force` registers what the gate refuses.
    """

    name: str
    examples: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    general: tuple[Path, ...] = ()
    domain: str = ""
    description: str = ""
    recipe: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    limit: int | None = None
    test_limit: int = 100
    seed: int = 17
    docs: tuple[Path, ...] = ()
    questions: tuple[Path, ...] = ()
    mine: int = 200
    keep_suspects: bool = False
    force: bool = False

    def check_files(self) -> None:
        """Raises InvalidRequest where one is missing."""
        for path in (path for name in FILES for path in getattr(self, name)):
            if not path.exists():
                raise InvalidRequest(f"{path} does not exist.")

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values, with absolute paths: whoever works it off stands elsewhere."""
        values = dataclasses.asdict(self)
        return values | {name: [str(path.absolute()) for path in getattr(self, name)] for name in FILES}


def plan_from_dict(values: Mapping[str, Any]) -> Plan:
    """Read what `to_dict` wrote. Raises InvalidRequest that lists the fields where one is unknown, missing or mistyped."""
    known = {one.name: one for one in fields(Plan)}
    if unknown := set(values) - set(known):
        raise InvalidRequest(f"A plan has no {', '.join(sorted(unknown))}.", hint=f"Known: {', '.join(known)}.")
    if "name" not in values:
        raise InvalidRequest("A plan needs a name.", hint=f"Known: {', '.join(known)}.")
    return Plan(**{name: _value(name, value) for name, value in values.items()})


_KINDS: dict[str, type] = {
    "options": dict,
    "test_limit": int,
    "seed": int,
    "mine": int,
    "keep_suspects": bool,
    "force": bool,
}


def _value(name: str, value: Any) -> Any:
    if name in FILES:
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        if not listed or not all(isinstance(one, str) for one in value):
            raise InvalidRequest(f"The plan's {name} is a list of paths, not {value!r}.")
        return tuple(Path(one) for one in value)
    kind = _KINDS.get(name, str)
    if name == "limit":
        kind = int
        if value is None:
            return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidRequest(f"The plan's {name} is a {kind.__name__}, not {value!r}.")
    return value


def training_folder(folder: Path, plan: Plan, base: CachedModel) -> Path:
    """Where the stages are kept, below `folder`: the same plan on the same files and base goes on where it was left."""
    files = {name: [digest_of(path) for path in getattr(plan, name)] for name in ("examples", "general", "docs")}
    what: list[Any] = [plan.name, plan.domain, plan.recipe, plan.options, plan.limit, plan.seed, base.identity, files]
    what += [plan.mine, plan.keep_suspects, [digest_of(path) for path in plan.test], plan.test_limit]
    return folder / f"{plan.name}-{digest(what)[:12]}"


def digest_of(path: Path) -> str:
    """The hash of a file, or of the names and hashes of all files below a folder. Raises InvalidRequest where it is missing."""
    if path.is_dir():
        return digest([[str(one.relative_to(path)), sha256(one)] for one in sorted(path.rglob("*")) if one.is_file()])
    try:
        return sha256(path)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from None
