"""Reading comprehension found in documents by patterns: every answer is in the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.retrieval import Document
from collegium.training.documents.mining import texts_of
from collegium.training.documents.prose import clean, sections, sentences, subject
from collegium.training.documents.reading import comprehension
from collegium.training.rows.examples import Example

PAGE = Document(
    "kettle.1.txt",
    """KETTLE(1)                     User Commands                     KETTLE(1)

NAME
       kettle - boil water in a vessel

DESCRIPTION
       Kettle  boils  the  water  that the vessel holds.  It stops by it@
       self as soon as the water boils.

       -q, --quiet
              do not whistle when the water boils

       --until=DEGREES
              stop at DEGREES, see the table below

       -k     keep the water warm for an hour

   Reporting Bugs
       Write a letter to the kettle makers about every fault that you find.

KETTLE 2.1                        May 1999                       KETTLE(1)
""".replace("@", "\N{HYPHEN}"),
)
GUIDE = Document(
    "guide.md",
    """---
layout: page
---
# Tea house

<!-- not for readers -->

The tea house serves [green tea](green.md) and black tea to all who come by the river.

* [Start](#start)
* [Leaves](#leaves)
* [Cups](#cups)

## Leaves

A tea leaf is the dried leaf of an evergreen shrub. To keep leaves fresh, use a closed tin of metal.
Green leaves are steeped at a lower heat because boiling water makes them bitter.

Water that stands in the open loses its air over the hours of a day. Therefore, fresh water is drawn for each pot.
Old hands in the trade say that nobody can taste that. However, most guests can tell one pot from the other.

## `pour(cup[, sugar])`

* `cup` {Cup} The cup that is filled with tea.
* `sugar` {number} Lumps that are put into it first. **Default:** `2`
* Returns: {Cup} The same cup, now full.

Fills a cup with tea up to its brim. The `'spilled'` event is emitted when the cup is too small for that.

```js
pour(cup);  // A comment is a thing that nobody is asked about.
```

## License

Everybody is allowed to drink as much tea as there is in the house.

[unused]: https://example.org
""",
)


def asked(documents: list[Document], seed: int = 0) -> dict[str, list[Example]]:
    rows: dict[str, list[Example]] = {}
    for row in comprehension(documents, seed=seed, limit=1000):
        rows.setdefault(row.topic, []).append(row)
    return rows


def answers(documents: list[Document]) -> dict[str, list[str]]:
    return {topic: [row.answer for row in rows] for topic, rows in asked(documents).items()}


def test_a_manual_page_says_what_its_command_and_options_do() -> None:
    found = answers([PAGE])
    assert found["command"] == ["boil water in a vessel"]
    assert sorted(found["option"]) == ["do not whistle when the water boils", "keep the water warm for an hour"]
    assert sorted(found["which_option"]) == ["-k", "-q, --quiet"]
    assert found["whole"] == [
        "Kettle boils the water that the vessel holds. It stops by itself as soon as the water boils."
    ]
    assert "letter" not in str(found)
    options = {row.answer: row.prompt for row in asked([PAGE])["option"]}
    assert "--quiet" in options["do not whistle when the water boils"]
    assert all("kettle" in prompt for prompt in options.values())


def test_markdown_says_what_things_are_how_why_and_what_follows() -> None:
    found = answers([GUIDE])
    assert found["whole"] == ["The tea house serves green tea and black tea to all who come by the river."]
    assert found["is"] == ["A tea leaf is the dried leaf of an evergreen shrub."]
    assert found["how"] == ["To keep leaves fresh, use a closed tin of metal."]
    assert found["because"] == ["Because boiling water makes them bitter."]
    assert found["follows"] == ["Therefore, fresh water is drawn for each pot."]
    assert found["limit"] == ["However, most guests can tell one pot from the other."]
    assert found["when"] == ["When the cup is too small for that."]
    assert found["returns"] == ["The same cup, now full."]
    assert found["default"] == ["`2`"]
    assert sorted(found["item"]) == ["Lumps that are put into it first.", "The cup that is filled with tea."]
    assert found["call"][0].startswith("Fills a cup")
    assert not any(word in str(found) for word in ("comment", "readers", "allowed", "[Start]", "green.md"))


def test_questions_name_what_they_are_about() -> None:
    for row in comprehension([GUIDE], seed=0, limit=100):
        if row.topic in ("item", "default", "returns", "call"):
            assert "pour(cup[, sugar])" in row.prompt
        if row.topic == "because":
            assert "Green leaves are steeped at a lower heat" in row.prompt
        assert "{" not in row.prompt.replace("{Cup}", "")


@pytest.mark.parametrize("document", [PAGE, GUIDE])
def test_every_answer_is_a_piece_of_its_document(document: Document) -> None:
    text = " ".join(clean(document).replace("\N{HYPHEN}\n       ", "").split()).casefold()
    rows = comprehension([document], seed=3, limit=1000)
    assert rows
    for row in rows:
        assert row.answer.casefold() in text
        assert (row.group, row.source, row.context) == (document.name, "reading", "")


def test_rows_are_the_same_for_a_seed_and_a_further_document_changes_none() -> None:
    alone, both = comprehension([GUIDE], seed=5, limit=1000), comprehension([GUIDE, PAGE], seed=5, limit=1000)
    assert alone == comprehension([GUIDE], seed=5, limit=1000)
    assert {*alone} <= {*both}
    assert len({row.id for row in both}) == len(both)
    others = {row.id: row.prompt for row in comprehension([GUIDE], seed=6, limit=1000)}
    assert others.keys() == {row.id for row in alone}
    assert any(others[row.id] != row.prompt for row in alone)


def test_a_limit_takes_of_all_kinds_alike() -> None:
    rows = comprehension([GUIDE, PAGE], seed=0, limit=10)
    assert len(rows) == 10
    assert len({row.topic for row in rows}) == 10


def test_a_question_with_two_answers_is_not_asked() -> None:
    other = Document("more.1.txt", PAGE.text.replace("do not whistle when", "be still while"))
    assert sorted(answers([PAGE, other])["option"]) == ["keep the water warm for an hour"]


def test_texts_are_cleaned_and_what_all_documents_have_is_dropped() -> None:
    licence = (
        "Permission is granted to everybody to use this text for whatever they like, with no warranty of any kind."
    )
    twice = (
        "A long paragraph that stands in two documents, word by word the same, and that is worth to be read only once."
    )
    pages = [Document(f"{number}.txt", f"Page {number} is here.\n\n{licence}") for number in range(10)]
    pages += [Document("a.txt", f"{twice}\n\nOne."), Document("b.txt", f"{twice}\n\nTwo.")]
    texts = texts_of(pages)
    assert texts[:2] == ("Page 0 is here.", "Page 1 is here.")
    assert texts[10:] == (f"{twice}\n\nOne.", "Two.")
    (guide,) = texts_of([GUIDE])
    assert "green tea" in guide
    assert "pour(cup);  // A comment" in guide
    assert not any(piece in guide for piece in ("layout", "not for readers", "green.md", "#start", "https:"))


def test_code_in_markdown_keeps_what_looks_like_markup() -> None:
    text = "Say `<b>[x](y)</b>` **loudly** \\[now\\].\n\n```html\n<!-- kept --> <i>[a](b)</i>\n```\n"
    assert clean(Document("a.md", text)) == (
        "Say `<b>[x](y)</b>` loudly [now].\n\n```html\n<!-- kept --> <i>[a](b)</i>\n```"
    )


def test_sections_know_the_titles_around_them() -> None:
    text = "Top\n===\n\nIntro here.\n\nInner\n-----\n\n```\n# no title\n```\n\n# Next\n"
    document = Document("a.rst", text)
    assert [section.titles for section in sections(document)] == [("Top",), ("Top", "Inner"), ("Next",)]
    assert subject(document) == "Top"
    assert subject(Document("tea_house.txt", "Nothing but a line.")) == "tea house"


def test_sentences_end_where_they_do() -> None:
    text = "Take leaves, e.g. Assam or Ceylon. Steep them (as long as you like.) `pot` is next! Drink."
    assert sentences(text) == [
        "Take leaves, e.g. Assam or Ceylon.",
        "Steep them (as long as you like.)",
        "`pot` is next!",
        "Drink.",
    ]


@given(
    st.text(alphabet=st.sampled_from("aB .!?`*_[]()<>#-=\n\\:{}~0|\N{HYPHEN}"), max_size=300),
    st.sampled_from([".md", ".txt"]),
)
def test_any_text_can_be_read(text: str, suffix: str) -> None:
    document = Document(f"a{suffix}", text)
    for row in comprehension([document], seed=0, limit=100):
        assert row.prompt
        assert row.answer.strip()
    assert all(block.strip() for block in texts_of([document]))
    assert " ".join(sentences(" ".join(text.split()))).split() == text.split()
