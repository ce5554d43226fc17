"""What documents give to train on: question-answer pairs that a model mines, each held by a round trip, and clean texts.

LLMiner (*A Self-enhancement Approach for Domain-specific Chatbot Training via Knowledge Mining and Digest*) has a model write
questions that a passage answers, and the answers from it. Small models write much that the passage does not say, so a pair is
kept only where the question leads back to its passage and a second reading of that says the same.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from math import log
from pathlib import Path
from typing import Any

from ...retrieval import Chunk, Document, Encode, Index, build_index, chunk
from ...schema import Passage, digest
from ..rows.examples import Example
from ..rows.wording import ask as worded
from .asking import Ask
from .prose import CODE, blocks, clean, content_words, one_line, repeated, subject
from .round_trip import Why, agreement, question_in, unfit, unsupported, whole

SOURCE = "mined"
QUESTIONS = (
    "{passage}\n\nWrite one question about this text. The question must be answered by the text.",
    "From the documentation of {name}:\n\n{passage}\n\n"
    "Write one question about {name}. The question must be answered by this text.",
)
"""How a passage is asked about: in the first way, and where more is wanted than that gave, in the next."""
ANSWER = "Answer the question from this text alone, briefly and with its words.\n\n{passage}\n\nQuestion: {question}"
QUESTION_TOKENS, ANSWER_TOKENS = 64, 160
TRIES = 10
"""Questions that are asked for each one that is wanted, at most: some models and some texts give none."""
AT_ONCE = 64
"""Passages that are worked on together."""
LETTERS, LETTER_SHARE = 200, 0.6
"""What a passage must have of letters, outside of its code, to say something in sentences."""
NEAREST = 3
"""The passage of a question is among so many nearest to it of all."""
NAMED = 0.5
"""The share of a question's words, the rare ones weighing more, that stand in its passage."""
AGREED = 0.5
"""The least agreement between two readings."""
LONG = 100
"""Characters from which a block that another document has too is a copy, not a way of speaking."""
SHOWN = 3
"""Questions that the report shows for each reason to drop them."""


@dataclass(frozen=True, slots=True)
class Mined:
    """The pairs that were kept, and counts of what was asked and of what was dropped at which check."""

    examples: tuple[Example, ...]
    report: Mapping[str, Any]


@dataclass(slots=True)
class _Tally:
    """What has become of the questions so far."""

    kept: list[Example] = field(default_factory=list)
    words: list[frozenset[str]] = field(default_factory=list)
    asked: int = 0
    dropped: Counter[Why] = field(default_factory=Counter)
    shown: dict[Why, list[str]] = field(default_factory=lambda: defaultdict(list))

    def drop(self, why: Why, text: str) -> None:
        self.dropped[why] += 1
        if len(self.shown[why]) < SHOWN:
            self.shown[why].append(text)


def mine(
    documents: Sequence[Document],
    ask: Ask,
    *,
    limit: int,
    seed: int,
    progress: Callable[[int, int], None],
    embed: Encode,
) -> Mined:
    """At most `limit` pairs; the group of each is its document, its context the passage.

    Passages are taken from all documents in turn. With an `ask` that answers alike every time, so is what comes out. Raises
    what `ask` raises. White space must stand between the words of a language for its answers to be checked.
    """
    passages = [piece for document in documents for piece in chunk(document)]
    worth = [piece for piece in passages if _says_something(piece.text)]
    tally = _Tally()
    to_ask = min(limit * TRIES, len(worth) * len(QUESTIONS))
    if to_ask:
        steps = len(passages) + to_ask
        find = _Finder.over(passages, embed, lambda done: progress(done, steps))
        names = {document.name: subject(document) for document in documents}
        turns = islice(_turns(worth, names, seed), to_ask)
        while len(tally.kept) < limit and (together := list(islice(turns, AT_ONCE))):
            _round(together, ask, find, tally)
            progress(len(passages) + tally.asked, steps)
        progress(steps, steps)
    report = {
        "documents": len(documents),
        "passages": len(passages),
        "passages_of_prose": len(worth),
        "asked": tally.asked,
        "kept": min(len(tally.kept), limit),
        "not_needed": max(len(tally.kept) - limit, 0),
        "dropped": dict(tally.dropped.most_common()),
        "shown": dict(tally.shown),
    }
    return Mined(tuple(tally.kept[:limit]), report)


def _says_something(text: str) -> bool:
    """Whether most of it is words, and not code, a table or a list of links."""
    plain = "".join(CODE.sub("", text).split())
    letters = sum(map(str.isalpha, plain))
    return letters >= LETTERS and letters >= LETTER_SHARE * len(plain)


def _turns(passages: Sequence[Chunk], names: Mapping[str, str], seed: int) -> Iterator[tuple[Chunk, str]]:
    """Passages, and what is asked of each: one of each document, the next of each, and all in another way."""
    by_document: dict[str, list[Chunk]] = defaultdict(list)
    for passage in passages:
        by_document[passage.document].append(passage)
    rng = random.Random(seed)
    for wording in QUESTIONS:
        drawn = [rng.sample(pieces, len(pieces)) for pieces in by_document.values()]
        rng.shuffle(drawn)
        for piece in filter(None, chain.from_iterable(zip_longest(*drawn))):
            yield piece, wording.format(passage=piece.text, name=names[piece.document])


@dataclass(frozen=True, slots=True)
class _Finder:
    """Puts questions to all passages."""

    index: Index
    embed: Encode
    rarity: Mapping[str, float]
    """The inverse document frequency of each word, over passages."""

    @classmethod
    def over(cls, passages: Sequence[Chunk], embed: Encode, progress: Callable[[int], None]) -> _Finder:
        counts = Counter(word for passage in passages for word in set(content_words(passage.text)))
        rarity = {word: log((1 + len(passages)) / count) for word, count in counts.items()}
        with tempfile.TemporaryDirectory() as folder:
            build_index(passages, embed, Path(folder), encoder_id="", progress=lambda done, of: progress(done))
            return cls(Index.load(Path(folder), ""), embed, rarity)

    def nearest(self, questions: Sequence[str]) -> list[tuple[Passage, ...]]:
        """By meaning."""
        return [self.index.search(vector, NEAREST) for vector in self.embed(questions)] if questions else []

    def named(self, question: str, passage: str) -> float:
        """The share of the question's words that stand in the passage, weighted by their rarity."""
        weights = {word: self.rarity.get(word, max(self.rarity.values())) for word in content_words(question)}
        there = set(content_words(passage))
        return sum(weight for word, weight in weights.items() if word in there) / (sum(weights.values()) or 1.0)


def _round(turns: Sequence[tuple[Chunk, str]], ask: Ask, find: _Finder, tally: _Tally) -> None:
    """Question, find, answer, answer again: the dear steps last, and for what is left."""
    tally.asked += len(turns)
    open_ones: list[tuple[Chunk, str]] = []
    for (piece, _), said in zip(turns, ask([prompt for _, prompt in turns], QUESTION_TOKENS), strict=True):
        question = question_in(said)
        if why := unfit(question, tally.words):
            tally.drop(why, question or said)
        else:
            open_ones.append((piece, question))
            tally.words.append(frozenset(content_words(question)))
    found = find.nearest([question for _, question in open_ones])
    checked: list[tuple[Chunk, str]] = []
    for (piece, question), nearest in zip(open_ones, found, strict=True):
        if not any(_overlap(piece, other) for other in nearest):
            tally.drop("leads to other passages", question)
        elif find.named(question, piece.text) < NAMED:
            tally.drop("has few words of its passage", question)
        else:
            checked.append((piece, question))
    _answer(checked, ask, tally)


def _answer(pairs: Sequence[tuple[Chunk, str]], ask: Ask, tally: _Tally) -> None:
    """Read each passage for its question twice, the second time as an expert will be asked."""
    prompts = [ANSWER.format(passage=piece.text, question=question) for piece, question in pairs]
    held: list[Example] = []
    for (piece, question), said in zip(pairs, ask(prompts, ANSWER_TOKENS), strict=True):
        answer = whole(said)
        if why := unsupported(question, answer, piece.text):
            tally.drop(why, f"{question} {answer}")
        else:
            identity = f"{SOURCE}-{digest([piece.document, question])[:12]}"
            held.append(Example(question, answer, identity, SOURCE, context=piece.text, group=piece.document))
    again = ask([worded(example) for example in held], ANSWER_TOKENS)
    for example, said in zip(held, again, strict=True):
        if agreement(example.prompt, example.answer, whole(said)) < AGREED:
            tally.drop("is answered otherwise when asked again", f"{example.prompt} {example.answer} / {said}")
        else:
            tally.kept.append(example)


def _overlap(piece: Chunk, found: Passage) -> bool:
    """Passages that follow each other share some text."""
    return piece.document == found.document and piece.span[0] < found.span[1] and found.span[0] < piece.span[1]


def texts_of(documents: Sequence[Document]) -> tuple[str, ...]:
    """The documents' texts to go on pre-training with, cleaned, in their order; those of which nothing is left are left out.

    What stands in many documents (licences, notes on where to report bugs) is dropped from all, a longer block that was in a
    document before from the later ones.
    """
    everywhere = repeated(documents)
    seen: set[str] = set()
    texts = []
    for document in documents:
        found = [(block, one_line(block)) for block in blocks(clean(document))]
        kept = [
            (block, key) for block, key in found if key not in everywhere and not (len(key) >= LONG and key in seen)
        ]
        seen.update(key for _, key in kept)
        if kept:
            texts.append("\n\n".join(block for block, _ in kept))
    return tuple(texts)
