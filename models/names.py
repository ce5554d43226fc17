"""Model names: `hf:org/name`, `pypi:package==version/path`, or a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from ..errors import InvalidRequest
from ..schema import digest

_PYPI = re.compile(r"pypi:(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9._+!-]+)/(?P<path>.+)")
_HF = re.compile(r"hf:(?P<repo>[A-Za-z0-9._-]+/[A-Za-z0-9._-]+)(@(?P<revision>[A-Za-z0-9._/-]+))?")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A parsed name. `location` is the package, the hub repository or the folder; `path` is the part of it that is meant."""

    source: Literal["pypi", "hf", "folder"]
    location: str
    version: str | None = None
    path: PurePosixPath | None = None

    @property
    def slug(self) -> str:
        """A folder name for the cache, one per name."""
        parts = (self.location, self.version or "", *(self.path.parts if self.path else ()))
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(part for part in parts if part))
        return f"{readable}-{digest([self.source, *parts])[:8]}"


def parse_name(text: str) -> ModelName:
    """Read a model's name; raises InvalidRequest with the three accepted forms."""
    if match := _PYPI.fullmatch(text):
        path = PurePosixPath(match["path"])
        if not path.is_absolute() and ".." not in path.parts:
            return ModelName("pypi", match["package"], match["version"], path)
    elif match := _HF.fullmatch(text):
        return ModelName("hf", match["repo"], match["revision"])
    elif text and Path(text).expanduser().is_dir():
        return ModelName("folder", str(Path(text).expanduser().resolve()))
    raise InvalidRequest(
        f"{text!r} is not the name of a model.",
        hint="Use hf:org/name, pypi:package==version/path, or a folder that exists.",
    )
