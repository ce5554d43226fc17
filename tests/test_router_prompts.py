"""The project's own prompts: every domain in every style, none in two domains, and nobody's data among them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest

from collegium.router.prompts import FOLDER, own_prompts
from collegium.router.questions import free_questions
from collegium.router.rows import BACKGROUND
from collegium.router.words import users_words

PROMPTS = list(own_prompts())
DOMAINS = {domain for _, domain, _, _ in PROMPTS}
STYLES = {
    *("own/queries", "own/requests", "own/instructions", "own/statements", "own/exam"),
    *("own/informal", "own/neighbours", "own/long", "own/pasted", "own/questions"),
}
SOMEBODY = {
    "an e-mail address": r"[\w.+-]+@[\w-]+\.[a-z]{2,}\b",
    "a link": r"(?i)\b(?:https?://|www\.)\w",
    "a telephone number": r"(?<!\d)(?:\+\d{1,3}[ -])?\(?\d{3}\)?[ -]\d{3}[ -]\d{4}(?!\d)",
    "a card or account number": r"(?<!\d)\d{4}(?:[ -]\d{4}){3}(?!\d)",
    "somebody's folder": r"(?:/home|/Users|C:\\Users)[/\\]\w",
}


def same(text: str) -> str:
    """What is left of a prompt where case, spaces and marks do not count."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def test_every_domain_shows_every_style() -> None:
    shown = defaultdict(set)
    for _, domain, style, _ in PROMPTS:
        shown[domain].add(style)
    assert {domain for domain in shown if domain} == set(free_questions())
    assert len(DOMAINS - {BACKGROUND}) >= 7
    for domain in DOMAINS - {BACKGROUND}:
        assert shown[domain] == STYLES, domain
    assert not shown[BACKGROUND] & STYLES  # its own kinds: gibberish, fragments ...
    assert all(style.startswith("own/") for style in shown[BACKGROUND])


def test_domains_have_about_as_many_of_each_style() -> None:
    counts = Counter((style, domain) for _, domain, style, _ in PROMPTS if domain)
    for style in STYLES:
        sizes = [counts[style, domain] for domain in DOMAINS if domain]
        assert min(sizes) >= 15, style
        assert max(sizes) <= 1.25 * min(sizes), style


def test_no_prompt_is_of_two_domains_or_twice_in_one_file() -> None:
    domains, files = defaultdict(set), defaultdict(list)
    for text, domain, _, place in PROMPTS:
        if key := same(text):
            domains[key].add(domain)
            files[key, place.partition(":")[0]].append(place)
    assert [key for key, found in domains.items() if len(found) > 1] == []
    assert [found for found in files.values() if len(found) > 1] == []


def test_ids_are_unique_and_name_the_file() -> None:
    places = [place for _, _, _, place in PROMPTS]
    assert len(set(places)) == len(places)
    assert {place.partition(":")[0] for place in places} == {
        *(file.name for file in FOLDER.iterdir()),
        "questions.yaml",
    }
    assert {file.stem for file in FOLDER.iterdir()} == {domain or "background" for domain in DOMAINS}


def test_every_prompt_is_a_text() -> None:
    for text, _, _, place in PROMPTS:
        assert isinstance(text, str), place  # unquoted, YAML takes `no` and `3:1` for something else
        assert text.strip(), place
        assert "\x00" not in text
        assert len(text) < 4000, place


@pytest.mark.parametrize("what", SOMEBODY)
def test_nobody_is_in_them(what: str) -> None:
    found = [(place, hit[0]) for text, _, _, place in PROMPTS if (hit := re.search(SOMEBODY[what], text))]
    assert found == []


def test_the_router_reads_them_as_they_are_written() -> None:
    """It is fitted on whole prompts, so of these nothing may be taken for a wrapping of somebody else's."""
    changed = [place for text, domain, _, place in PROMPTS if domain and users_words(text).strip() != text.strip()]
    assert changed == []
