"""Prompts as people send them, by domain and style: this project's own, in prompts/<domain>.yaml and questions.yaml.

Data sets have a style each, and a router that is fitted on them alone learns the style. These prompts show every domain in the
same ten styles, so that only what a prompt is about tells them apart; `background` fits no domain at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .questions import free_questions
from .rows import BACKGROUND

FOLDER = Path(__file__).parent / "prompts"


def own_prompts() -> Iterator[tuple[str, str, str, str]]:
    """(text, domain, source, id) of each; the source is `own/` and the style."""
    import yaml

    for file in sorted(FOLDER.glob("*.yaml")):
        domain = BACKGROUND if file.stem == "background" else file.stem
        for style, texts in yaml.safe_load(file.read_text("utf-8")).items():
            for number, text in enumerate(texts, 1):
                yield text, domain, f"own/{style}", f"{file.name}:{style}:{number}"
    for domain, questions in free_questions().items():
        for number, text in enumerate(questions, 1):
            yield text, domain, "own/questions", f"questions.yaml:{domain}:{number}"
