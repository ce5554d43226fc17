"""Question-answer pairs mined from documents: what a model writes is kept only where its passage bears it out."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from collegium.errors import InvalidRequest, RemoteUnavailable
from collegium.experts.remote.client import RemoteClient
from collegium.models.cache import CachedModel
from collegium.retrieval import Document
from collegium.settings import Settings
from collegium.tests.engine_models import hosting
from collegium.tests.remote_server import Model, RemoteServer, serving
from collegium.training.documents.asking import Ask, AskModel, AskServer
from collegium.training.documents.mining import Mined, mine
from collegium.training.documents.prose import content_words
from collegium.training.documents.round_trip import agreement, question_in, unfit, unsupported, whole

THINGS = ("kettle", "teapot", "saucer", "strainer", "samovar", "caddy", "whisk", "tray")
MATTERS = ("copper", "iron", "porcelain", "silver", "brass", "walnut", "bamboo", "tin")


def text_of(thing: str, matter: str) -> str:
    return (
        f"The {thing} of the old house is made of {matter}, and it was bought by the grandmother at a market near the river. "
        f"Whoever visits may look at the {thing} on Sundays, but nobody may carry it away or wash it with sand. "
        f"In winter the {thing} stands on the shelf beside the stove, where the children can not reach it."
    )


DOCUMENTS = [Document(f"{thing}.txt", text_of(thing, matter)) for thing, matter in zip(THINGS, MATTERS, strict=True)]


def embed(texts: Sequence[str]) -> NDArray[np.float32]:
    """Bags of content words, hashed."""
    rows = np.full((len(texts), 256), 1e-3, np.float32)
    for row, text in zip(rows, texts, strict=True):
        for word in content_words(text):
            row[zlib.crc32(word.encode()) % 256] += 1
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def scripted(
    question: Callable[[str], str] = "What is the {} of the old house made of?".format,
    answer: Callable[[str, str], str] = "The {0} is made of {1}.".format,
    again: Callable[[str, str], str] = "It is made of {1}, the {0} of the house.".format,
) -> Ask:
    """Somebody who knows the house; each is given what the passage is about, and what that is made of."""

    def ask(prompts: Sequence[str], max_tokens: int) -> Iterator[str]:
        for prompt in prompts:
            thing, matter = next(
                pair for pair in zip(THINGS, MATTERS, strict=True) if f"The {pair[0]} of the old" in prompt
            )
            if "Write one question" in prompt:
                yield question(thing)
            else:
                yield (answer if prompt.startswith("Answer") else again)(thing, matter)

    return ask


def mined(ask: Ask, documents: Sequence[Document] = DOCUMENTS, limit: int = 100, seed: int = 0) -> Mined:
    steps: list[tuple[int, int]] = []
    found = mine(documents, ask, limit=limit, seed=seed, progress=lambda *step: steps.append(step), embed=embed)
    assert steps == sorted(steps)
    assert all(done <= of for done, of in steps)
    assert not steps or steps[-1][0] == steps[-1][1]
    return found


def dropped(ask: Ask) -> dict[str, int]:
    """Why all of the first questions were dropped."""
    found = mined(ask)
    assert found.examples == ()
    assert found.report["kept"] == 0
    counts: dict[str, int] = found.report["dropped"]
    assert sum(counts.values()) == found.report["asked"]
    assert {*found.report["shown"]} == {*counts}
    return counts


def test_pairs_that_their_passages_bear_out_are_kept() -> None:
    found = mined(scripted())
    assert {row.group for row in found.examples} == {document.name for document in DOCUMENTS}
    for row in found.examples:
        thing = row.group.removesuffix(".txt")
        assert row.prompt == f"What is the {thing} of the old house made of?"
        assert row.answer == f"The {thing} is made of {MATTERS[THINGS.index(thing)]}."
        assert (row.source, row.context) == ("mined", text_of(thing, MATTERS[THINGS.index(thing)]))
    assert found.report["dropped"] == {"was asked before": 8}, "asked in another way, the same was said"
    assert (found.report["documents"], found.report["passages"], found.report["asked"]) == (8, 8, 16)
    assert len({row.id for row in found.examples}) == 8


def test_the_same_seed_finds_the_same_and_a_limit_ends_it() -> None:
    assert mined(scripted(), limit=3) == mined(scripted(), limit=3)
    few = mined(scripted(), limit=3)
    assert (len(few.examples), few.report["kept"], few.report["not_needed"]) == (3, 3, 5)
    assert mined(scripted(), limit=3, seed=1).examples != mined(scripted(), limit=3).examples
    none = mined(scripted(), limit=0)
    assert (none.examples, none.report["asked"]) == ((), 0)


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("is no question", {"question": "The {} is made of it.".format}),
        ("does not stand by itself", {"question": "What does this passage say about the {}?".format}),
        ("does not stand by itself", {"question": "What is {}?".format}),
        ("leads to other passages", {"question": lambda thing: f"Which {other(thing)} do visitors of sundays see?"}),
        ("has few words of its passage", {"question": "Which emperor forged our {} under Vesuvius?".format}),
        ("says no more than its question", {"answer": "The {0} of the old house is made.".format}),
        ("says what its passage does not", {"answer": "The {0} is made of {1} and marble from Carrara.".format}),
        ("goes round in circles", {"answer": lambda thing, matter: f"{matter} river " * 9}),
        ("does not stand by itself", {"question": "What is the [{}][] of the old house made of?".format}),
        ("is answered otherwise when asked again", {"again": "Nobody may wash the {0} with sand.".format}),
    ],
)
def test_a_pair_is_dropped(why: str, said: dict[str, Any]) -> None:
    assert why in dropped(scripted(**said))


def other(thing: str) -> str:
    return THINGS[(THINGS.index(thing) + 1) % len(THINGS)]


def test_code_and_tables_are_not_asked_about() -> None:
    code = Document("a.md", "```js\n" + "call(1, 2);\n" * 50 + "```\n\n" + "| 1 | 2 |\n" * 50)
    found = mined(scripted(), [code])
    assert (found.report["passages_of_prose"], found.report["asked"]) == (0, 0)
    assert found.report["passages"] > 0
    assert mined(scripted(), []).report["documents"] == 0


@pytest.mark.parametrize(
    ("said", "question"),
    [
        ("What is tea?", "What is tea?"),
        ('Sure! Here it is:\n\nQuestion 1: "What is tea made of?" And so on.', "What is tea made of?"),
        ("The question is: How hot is it?", "How hot is it?"),
        ("1. Why is `node:fs` slow?\n2. Why not?", "Why is `node:fs` slow?"),
        ("Tea is hot.", ""),
        ("?", "?"),
        ("", ""),
    ],
)
def test_a_question_is_found_in_what_a_model_says(said: str, question: str) -> None:
    assert question_in(said) == question


def test_a_question_is_new_where_it_names_something_else() -> None:
    before = [frozenset(content_words("What is the purpose of the --all option of ls?"))]
    assert unfit("What is the purpose of the --size option of ls?", before) == ""
    assert unfit("What's the purpose of ls's option --all?", before) == "was asked before"


def test_an_answer_stands_in_one_place_of_its_passage() -> None:
    passage = "Tea is green. Cups are blue. Pots are brown. Trays are red. Spoons are grey. Tins are black."
    assert unsupported("What is there?", "Blue cups and brown pots.", passage) == ""
    assert unsupported("What is there?", "Green cups, red spoons, black tins.", passage).startswith("is put together")


def test_an_answer_that_breaks_off_is_cut_where_a_sentence_ends() -> None:
    assert whole("Tea is hot. It is made of lea") == "Tea is hot."
    assert whole("made of\nleaves\n\nBut then again") == "made of leaves"
    assert whole("") == ""


def test_readings_agree_by_more_than_the_words_of_their_question() -> None:
    question = "What is the purpose of the old brown kettle?"
    assert agreement(question, "The purpose of the old brown kettle is tea.", "The old brown kettle is for soup.") == 0
    assert agreement(question, "It is for boiling water.", "The kettle boils water.") == 1
    assert unsupported(question, "It boils water.", "All water is boiled there.") == ""


@pytest.fixture(scope="module")
def server(tiny_base: Path) -> Iterator[RemoteServer]:
    with serving(Model(tiny_base)) as running:
        yield running


def test_a_local_model_answers_in_order_and_what_does_not_fit_is_left(tiny_base: Path, tmp_path: Path) -> None:
    with hosting(CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny"), tmp_path) as host:
        ask = AskModel(host)
        one, long, other_one = ask(["violin", "tea " * 2000, "guitar"], 6)
        assert [one, "", other_one] == [*ask(["violin"], 6), long, *ask(["guitar"], 6)]
        assert one
        assert list(ask([], 6)) == []


def test_a_server_answers_as_the_model_would(tiny_base: Path, tmp_path: Path, server: RemoteServer) -> None:
    questions = [f"violin {number}" for number in range(20)]
    with hosting(CachedModel("tiny", tiny_base, "LlamaForCausalLM", "tiny"), tmp_path) as host:
        expected = list(AskModel(host)(questions, 4))
    ask = AskServer(RemoteClient(server.url, "tiny-mining", "", Settings(remote_retries=0)))
    with server.acting():
        assert list(ask(questions, 4)) == expected
        assert server.most_active > 1
    assert ask.spent.paid.calls == len(questions)
    assert ask.spent.paid.completion_tokens > 0


def test_what_a_server_refuses_is_left_unless_it_refuses_all(server: RemoteServer) -> None:
    ask = AskServer(RemoteClient(server.url, "tiny-refusing", "", Settings(remote_retries=0)))
    with server.acting(failures=[(400, {})]), pytest.raises(InvalidRequest):
        list(ask(["violin"], 4))
    with server.acting():
        answers = ask(["violin"] * 9, 4)
        first = next(answers)
        server.can.failures.append((400, {}))
        assert [first, *answers] == [first] * 8 + [""]
    with server.acting(failures=[(503, {})]), pytest.raises(RemoteUnavailable):
        list(ask(["violin"], 4))


def test_a_server_that_settings_do_not_name_is_not_asked() -> None:
    with pytest.raises(InvalidRequest, match="remote_hosts"):
        AskServer(RemoteClient("https://example.com/v1", "x", "", Settings()))
