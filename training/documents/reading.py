"""Documents turned into reading comprehension, without a model.

*TransformLLM: Adapting Large Language Models via LLM-Transformed Reading Comprehension Text* lets a model write tasks about raw
text. Here patterns find them in it, as in the work that it goes back to (AdaptLLM, Cheng et al. 2024, "Adapting Large Language
Models via Reading Comprehension"): what a section is about, what a term means, what an option does, why, and how a text goes on.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest

from ...retrieval import Document
from ...schema import digest
from ..rows.examples import Example
from .facts import Fact, facts
from .prose import repeated

SOURCE = "reading"
WORDINGS: Mapping[str, tuple[str, ...]] = {
    "command": ("What does the command {thing} do?", "What is {thing} for?", "In a few words, what does {thing} do?"),
    "whole": ("What is {thing} about?", "Explain what {thing} is.", "Tell me about {thing}."),
    "call": ("What does {thing} do?", "Explain {thing}.", "What is {thing} for?"),
    "section": (
        "What does the documentation of {about} say about {thing}?",
        "Explain this topic of {about}: {thing}.",
        "{about}: what should I know about {thing}?",
    ),
    "title": (
        "Which title fits this text from the documentation of {about}?\n\n{text}",
        "Write a title for this text.\n\n{text}",
        "What is this text about? Answer with a title.\n\n{text}",
    ),
    "option": (
        "What does {thing} of {about} do?",
        "What is the option {thing} of {about} for?",
        "What happens when {about} is given {thing}?",
    ),
    "which_option": (
        "Which option of {about} does this: {text}?",
        "I need an option of {about}: {text}. Which one is it?",
        "What is the option of {about} for this? {text}",
    ),
    "item": ("What is {thing} in {about}?", "What does {thing} mean in {about}?", "{about}: what is {thing} for?"),
    "default": ("What is the default of {thing} in {about}?", "{about}: what does {thing} default to?"),
    "returns": ("What does {about} return?", "What do I get back from {about}?"),
    "is": ("What is {thing}?", "Explain what {thing} is.", "In a sentence, what is {thing}?"),
    "are": ("What are {thing}?", "Explain what {thing} are.", "In a sentence, what are {thing}?"),
    "is_in": (
        "In {about}, what is {thing}?",
        "What does {thing} mean in {about}?",
        "{about}: explain what {thing} is.",
    ),
    "does": (
        "In {about}, what does {thing} do?",
        "{about}: what is {thing} for?",
        "Explain what {thing} does in {about}.",
    ),
    "when": ("In {about}, when is {thing} {done}?", "{about}: when is {thing} {done}?"),
    "how": ("How do I {thing}?", "What do I do to {thing}?", "{about}: how can I {thing}?"),
    "because": ("Why is this so: {text}?", "{about}: what is the reason for this? {text}.", "{text}. Why?"),
    "follows": ("What follows from this? {text}", "{text} What does that lead to?"),
    "limit": ("What must be kept in mind about this? {text}", "{text} What limits that?"),
    "continue": (
        "How does this text about {about} go on?\n\n{text}",
        "Continue this text about {about}.\n\n{text}",
        "Complete this passage:\n\n{text}",
    ),
}
"""How facts of each kind are asked for."""


def comprehension(documents: Sequence[Document], *, seed: int, limit: int) -> list[Example]:
    """At most `limit` rows, of all kinds alike where there are enough; each document is a group.

    Every answer is a piece of its document's text, as `prose.clean` has it, but for white space and a capital at its
    beginning. A question that has two answers is not asked. The `topic` of a row is its kind.
    """
    everywhere = repeated(documents)
    found = [(document, fact) for document in documents for fact in facts(document, everywhere)]
    answers: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for _, fact in found:
        answers[fact.question].add(fact.answer)
    rows: dict[str, dict[str, Example]] = defaultdict(dict)
    for document, fact in found:
        if len(answers[fact.question]) == 1:
            row = _row(document, fact, seed)
            rows[row.topic].setdefault(row.id, row)
    rng = random.Random(seed)
    drawn = (rng.sample(list(rows[kind].values()), len(rows[kind])) for kind in WORDINGS if kind in rows)
    return [row for row in chain.from_iterable(zip_longest(*drawn)) if row][:limit]


def likely_questions(documents: Sequence[Document], name: str, *, seed: int, limit: int) -> list[str]:
    """What people may ask who do not know the documents' words: how to do what commands and options do, and what things are.

    In equal parts bare, with the `name` of the domain, and about the things by name: a router learns a domain from questions
    better than from passages, which read unlike any.
    """
    rng, everywhere = random.Random(seed), repeated(documents)
    tasks: dict[str, None] = {}
    things: dict[str, None] = {}
    for fact in (fact for document in documents for fact in facts(document, everywhere)):
        thing = fact.asked.get("thing", "").replace("_", " ")
        if fact.kind in DOING and (task := _clause(thing if fact.kind == "how" else fact.answer)):
            tasks[task] = None
        if fact.kind == "command":
            things |= dict.fromkeys((f"What does {thing} do?", f"How do I use {thing} in {name}?", f"What is {thing}?"))
        elif fact.kind in ("whole", "section", "is"):
            things[f"What is {thing} in {name}?"] = None
    bare, named, about = (rng.sample([*part], len(part)) for part in (tasks, tasks, things))
    asked = zip_longest((f"How do I {one}?" for one in bare), (f"How can I {one} in {name}?" for one in named), about)
    return [question for three in asked for question in three if question][:limit]


DOING = ("command", "option", "call", "how")
"""Kinds of facts whose answers say what is done."""
FEWEST_WORDS, MOST_WORDS = 4, 17
"""Of what is done, so that a question can be made of it."""


def _clause(answer: str) -> str:
    """The beginning of an answer as what is to be done, empty where that is no clause."""
    clause = re.split(r"(?<=[.;:])\s", answer.strip())[0].rstrip(".;:")
    return clause[0].lower() + clause[1:] if FEWEST_WORDS <= len(clause.split()) <= MOST_WORDS else ""


def _row(document: Document, fact: Fact, seed: int) -> Example:
    identity = digest([*fact.question, fact.answer])[:12]
    # Drawn for each fact by itself: a further document leaves the rows of the others as they are.
    wording = random.Random(f"{seed} {identity}").choice(WORDINGS[fact.kind])
    answer = fact.answer[0].upper() + fact.answer[1:] if fact.kind in ("because", "when") else fact.answer
    return Example(
        prompt=wording.format(**fact.asked),
        answer=answer,
        id=f"{SOURCE}-{identity}",
        source=SOURCE,
        topic=fact.kind,
        group=document.name,
    )
