"""Questions as people ask them, by domain: this project's own, in questions.yaml."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path


@functools.cache
def free_questions() -> Mapping[str, tuple[str, ...]]:
    """The questions of each domain; those of `general` are for everybody."""
    import yaml

    body = yaml.safe_load((Path(__file__).parent / "questions.yaml").read_text("utf-8"))
    return {domain: tuple(questions) for domain, questions in body.items()}
