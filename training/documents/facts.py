"""What a document says that can be asked for: found by patterns, each answer a piece of the text.

The patterns are those of English technical prose; of other texts they find headings, options and continuations alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field

from ...retrieval import Document
from .prose import Section, is_man, items, one_line, sections, sentences, subject

MOST = 600
"""Characters of an answer."""
_FEWEST_WORDS = 5
_LONGEST_THING = 80
_LONGEST_DEFAULT = 40
_TO_CONTINUE = 40
"""Words of a paragraph that is worth continuing."""

_BACK = re.compile(
    r"^(?:this|that|these|those|it|its|they|their|he|she|we|you|there|here|such|both|either|neither|another|one|each|then|also|"
    r"however|therefore|thus|hence|otherwise|instead|similarly|likewise|in addition|additionally|furthermore|moreover|"
    r"for example|for instance|note|if so|but|and|or|so|because|as a result|consequently|doing so|"
    r"the (?:above|former|latter|same|following|first|second|third|other|last|next|previous|result|default|value|callback|reason|"
    r"rest))\b",
    re.I,
)
"""How a sentence begins that leans on the one before."""
_BEGINS = re.compile(r"[^\W\d_a-z]|`")
_LAYOUT = re.compile(
    r"\b(?:above|below|following|example|figure|table|see|this (?:section|document|page|chapter))\b", re.I
)
_EMPTY = re.compile(r"^(?:see|refer to|example|for (?:more|further|details)|type:|value:|todo|\.\.\.)", re.I)
_BOILERPLATE = re.compile(
    r"^(?:authors?|copyright|see also|reporting bugs|licen[cs]e|colophon|history|contributors|table of contents|contents|index|"
    r"name|synopsis|availability|standards|version|acknowledge?ments)\b",
    re.I,
)
_WHOLE = re.compile(r"^(?:description|overview|introduction|about|summary)$", re.I)
_GENERIC = re.compile(r"^(?:notes?|examples?\b.*|usage|general|options?|parameters|remarks|details|\d.*)$", re.I)
_LABEL = re.compile(r"^[A-Z][\w ]*: (?=`)")
"""As in "Class: `Blob`"."""

_NOUN = "method|function|class|module|property|option|flag|command|API|interface|constructor|object"
_THING = r"(?P<thing>`[^`]+`(?: [a-z]+){0,2}|(?!(?:The|An?|If|When|To|In) )[A-Z][\w.'/+-]*(?: [\w.'/+-]+){0,3})"
_DEFINITION = re.compile(
    rf"^(?:(?P<the>The )|An? )?{_THING} (?P<verb>is|are) (?:an?|the|one of|any) (?!\w+ to\b)\S.*\.$"
)
_LOWER_DEFINITION = re.compile(
    r"^An? (?P<thing>[a-z][\w-]*(?: [\w-]+){0,2}) (?P<verb>is) (?:an?|the|one of|any) \S.*\.$"
)
_DOES = re.compile(
    rf"^(?:The )?(?P<thing>`[^`]+`(?: (?:{_NOUN}))?) (?!is\b|has\b|was\b|does\b|as\b|its\b|this\b)[a-z]{{2,}}s \S.*\.$"
)
_WHEN = re.compile(
    r"^(?:The )?(?P<thing>`[^`]+`(?: [a-z]+)?) is (?P<done>[a-z]+ed|thrown|run|set) "
    r"(?P<answer>(?:when|after|before|if|whenever|only if|only when|once) .+\.)$"
)
_HOW = re.compile(
    r"^To (?P<thing>(?!be\b|do\b|this\b)[a-z]+ [^,]{8,90}), (?:use|set|call|run|pass|specify|add|type|give|enable|disable) .+\.$"
)
_BECAUSE = re.compile(r"^(?P<thing>[^,;=|]{20,}?),? (?P<answer>because (?!of\b).{15,}\.)$")
_NEXT = (
    ("follows", re.compile(r"^(?:Therefore|Thus|Hence|As a result|Consequently|For this reason)\b,? ")),
    ("limit", re.compile(r"^However, ")),
)
_PRONOUN = re.compile(r"\b(?:it|this|they|these|that|there)\b", re.I)

_OPTION = re.compile(r"^(?P<indent>\s+)(?P<spec>-{1,2}[\w?@#][^\n]*?)(?:\s{2,}(?P<text>\S.*))?$")
_PLAIN_WORD = re.compile(r"[^\W\d_]{3,}")
_FLAG = re.compile(r"(?<![\w-])-{1,2}[\w?@#][\w-]*")
_ITEM = re.compile(
    r"^(?P<thing>`[^`]*\w\w[^`]*`)(?: ?\{[^}]*\}| ?<[^>]*>| ?\([^)]*\))?(?P<mark>:| [-\u2013\u2014])? (?P<answer>[A-Z`].*)$"
)
_DEFAULT = re.compile(r"\s*\bDefault(?: value)?(?: is|:) (?P<answer>[^\s].*?)\.?$")
_RETURNS = re.compile(r"^Returns:?(?: ?\{[^}]*\})? (?P<answer>[A-Z].*)$")
_CALL = re.compile(r"^(?:[A-Z][\w ]*: )?`(?:new )?[\w.#\[\]]+\(.*\)`$")


@dataclass(frozen=True, slots=True)
class Fact:
    """An answer, the `kind` of question that it answers, and what that is asked with."""

    kind: str
    answer: str
    asked: Mapping[str, str] = field(default_factory=dict)

    @property
    def question(self) -> tuple[str, ...]:
        """The same for all facts that answer one question."""
        return (self.kind, *(f"{name}={value}" for name, value in sorted(self.asked.items())))


@dataclass(frozen=True, slots=True)
class Scope:
    """Where something stands: under the title `own` in a document on `about`."""

    own: str
    about: str

    @classmethod
    def of(cls, section: Section, about: str, *, man: bool) -> Scope:
        """A page of a manual is small enough to be one."""
        return cls(_plain(section.titles[-1]) if section.titles and not man else about, about)

    def __str__(self) -> str:
        return self.own if self.own == self.about or self.own.endswith(")`") else f"{self.own} ({self.about})"

    def around(self, thing: str) -> str:
        """Said beside `thing`, which may be what the title names."""
        return self.about if self.own.strip("`") in thing else str(self)


def facts(document: Document, left_out: Set[str] = frozenset()) -> Iterator[Fact]:
    """All that is found, but in blocks that are `left_out`, in the order of the text."""
    about, man = subject(document), is_man(document.text)
    for section in sections(document):
        kept = Section(section.titles, tuple(one for one in section.blocks if one_line(one) not in left_out))
        if man and section.titles == ("NAME",):
            yield from _named(kept, about)
        if section.titles and _BOILERPLATE.match(section.titles[-1]):
            continue
        scope = Scope.of(section, about, man=man)
        yield from _section(kept, about)
        for block in kept.blocks:
            yield from _options(block, about) if man else _items(block, str(scope))
        for paragraph in kept.paragraphs:
            if not paragraph.startswith("-"):  # an option
                yield from _paragraph(paragraph, scope)


def _plain(title: str) -> str:
    return _LABEL.sub("", title).strip(" :")


def _named(section: Section, about: str) -> Iterator[Fact]:
    for paragraph in (one_line(block) for block in section.blocks):
        _, mark, answer = paragraph.rpartition(" - ")
        if mark and len(answer.split()) > 1:
            yield Fact("command", answer, {"thing": about})


def _section(section: Section, about: str) -> Iterator[Fact]:
    """What the section is about, and its title."""
    if not section.titles:
        return
    first = next(iter(section.paragraphs), "")
    answer = _beginning(first)
    if len(answer.split()) < _FEWEST_WORDS or first.startswith("-"):
        return
    title, plain = section.titles[-1], _plain(section.titles[-1])
    if _CALL.match(title):
        yield Fact("call", answer, {"thing": plain})
    elif title == about or (section.titles[:-1] in ((), (about,)) and _WHOLE.match(title)):
        yield Fact("whole", answer, {"thing": about})
    elif not _GENERIC.match(title) and not _WHOLE.match(title):
        yield Fact("section", answer, {"thing": plain, "about": about})
        if len(answer.split()) >= 2 * _FEWEST_WORDS and plain.strip("`").casefold() not in answer.casefold():
            yield Fact("title", plain, {"text": answer, "about": about})


def _beginning(paragraph: str) -> str:
    """Its first sentences, without those that only lead to something else."""
    taken: list[str] = []
    for sentence in sentences(paragraph):
        if sentence.endswith(":") or _EMPTY.match(sentence) or sum(map(len, taken)) + len(sentence) > MOST:
            break
        taken.append(sentence)
    return " ".join(taken)


def _options(block: str, about: str) -> Iterator[Fact]:
    """The options of a command; a description that stands beside its option or below it, deeper."""
    first = _OPTION.match(block.split("\n", maxsplit=1)[0])
    if not first:
        return
    entries: list[tuple[str, list[str]]] = []
    for line in block.split("\n"):
        found = _OPTION.match(line)
        if found and found["indent"] == first["indent"]:
            entries.append((found["spec"], [found["text"] or ""]))
        else:
            entries[-1][1].append(line)
    for spec, lines in entries:
        answer, flags = _beginning(one_line("\n".join(lines))), _FLAG.findall(spec)
        says = len(_PLAIN_WORD.findall(answer)) >= _FEWEST_WORDS - 2 and not _LAYOUT.search(answer)
        if not (says and flags and len(spec) <= _LONGEST_THING):
            continue
        yield Fact("option", answer, {"thing": max(flags, key=len), "about": about})
        if len(answer) < MOST / 4 and not _FLAG.search(answer) and not _PRONOUN.search(answer):
            yield Fact("which_option", spec, {"text": answer.rstrip("."), "about": about})


def _items(block: str, scope: str) -> Iterator[Fact]:
    """What parameters are for, what their defaults are, and what is returned."""
    for item in items(block):
        returns, entry, default = _RETURNS.match(item), _ITEM.match(item), _DEFAULT.search(item)
        said = _DEFAULT.sub("", (returns or entry or {"answer": ""})["answer"])
        answer = _beginning(said)
        worth = len(answer.split()) >= _FEWEST_WORDS - 1 and not _LAYOUT.search(answer)
        if returns and worth:
            yield Fact("returns", answer, {"about": scope})
        elif entry and worth and (entry["mark"] or "{" in item) and len(entry["thing"]) < _LONGEST_THING:
            yield Fact("item", answer, {"thing": entry["thing"], "about": scope})
        if entry and default and len(default["answer"]) < _LONGEST_DEFAULT and not default["answer"].endswith(":"):
            yield Fact("default", default["answer"], {"thing": entry["thing"], "about": scope})


def _paragraph(paragraph: str, scope: Scope) -> Iterator[Fact]:
    """What its sentences say by themselves, what follows from one of them, and how the whole goes on."""
    found = [one for one in sentences(paragraph) if not one.endswith(":")]
    for before, sentence in zip(["", *found], found, strict=False):
        if (
            _BEGINS.match(sentence)
            and not _BACK.match(sentence)
            and not _LAYOUT.search(sentence)
            and len(sentence) < MOST
        ):
            yield from _sentence(sentence, scope)
        for kind, connective in _NEXT:
            if (
                before
                and connective.match(sentence)
                and not _BACK.match(before)
                and not _LAYOUT.search(before + sentence)
            ):
                yield Fact(kind, sentence, {"text": before, "about": str(scope)})
    half = len(found) // 2
    if half and len(paragraph.split()) >= _TO_CONTINUE and not _LAYOUT.search(paragraph) and not _BACK.match(paragraph):
        yield Fact("continue", _within(found[half:]), {"text": " ".join(found[:half]), "about": str(scope)})


def _within(found: list[str]) -> str:
    """As many sentences as an answer may have; one at least."""
    return _beginning(" ".join(found)) or found[0]


def _sentence(sentence: str, scope: Scope) -> Iterator[Fact]:
    """What a term means, what something does and when, how and why: of a sentence that needs no other."""
    if (defined := _DEFINITION.match(sentence) or _LOWER_DEFINITION.match(sentence)) and " if " not in sentence:
        thing = defined["thing"]
        if (
            not _PRONOUN.search(thing)
            and len(thing) < _LONGEST_THING
            and ("`" in thing or " " in thing or not defined.groupdict().get("the"))
        ):
            kind = "is_in" if "`" in thing else defined["verb"]
            yield Fact(kind, sentence, {"thing": _with_article(thing), "about": scope.around(thing)})
    elif does := _DOES.match(sentence):
        yield Fact("does", sentence, {"thing": _with_article(does["thing"]), "about": scope.around(does["thing"])})
    elif when := _WHEN.match(sentence):
        asked = {"thing": _with_article(when["thing"]), "done": when["done"], "about": scope.around(when["thing"])}
        yield Fact("when", when["answer"], asked)
    elif (how := _HOW.match(sentence)) and not _PRONOUN.search(how["thing"]):
        yield Fact("how", sentence, {"thing": how["thing"], "about": str(scope)})
    if (because := _BECAUSE.match(sentence)) and not _PRONOUN.search(because["thing"]):
        yield Fact("because", because["answer"], {"text": because["thing"], "about": str(scope)})


def _with_article(thing: str) -> str:
    """As in "the `size` argument"."""
    return thing if thing.endswith("`") or "`" not in thing else f"the {thing}"
