"""Documents as prose: without markup, in sections, paragraphs, lists and sentences.

Markdown, reStructuredText with underlined headings, rendered manual pages (`man page | col -b`) and plain text are read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath

from ...retrieval import Document

SHARE, SEVERAL = 0.2, 3
"""A block that this share of the documents has, and so many at least, is of them all: a licence, where to report bugs."""
CODE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n]*\n.*?(?:^[ \t]*\1[ \t]*$|\Z)", re.M | re.S)
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.S)
_INLINE = re.compile(r"(`+)(?!`).*?[^`]\1(?!`)|\x00\d+\x00", re.S)
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_TAG = re.compile(r"</?[a-z][a-z0-9]*(?:\s[^<>]*)?/?>", re.I)
_IMAGE = re.compile(r"!\[[^\]]*\](?:\([^()\s]*\)|\[[^\]]*\])")
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])+)\](?:\((?:[^()\s]|\([^()]*\))*(?: \"[^\"]*\")?\)|\[[^\]]*\])")
_REFERENCE = re.compile(r"^ {0,3}\[[^\]\n]+\]:[ \t]*\S.*$", re.M)
_MAN_EDGE = re.compile(r"^(\S+\(\d\w*\))\s{2,}.*$|^\S.*\s{2,}\S+\(\d\w*\)$", re.M)
_MAN_NAME = re.compile(r"^NAME\n\s+\S", re.M)
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2}|_{1,2})(?=\S)([^*_\n]+?)(?<=\S)\1(?![\w*])")
_NAVIGATION = re.compile(
    r"(?:^[ \t]*(?:[*+-]|\d+\.)[ \t]+\[[^\n]*\](?:\([^\n]*\)|\[[^\n]*\])?[ \t]*(?:\n|\Z)){3,}", re.M
)
_ESCAPE = re.compile(r"\\([\[\]<>*_`#{}()!.+|-])")
_BLANKS = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)*")

_MAN_LEVELS = {0: 1, 3: 2}
"""By the indentation of a heading of a manual page."""
_HEADING = re.compile(r"^(#{1,6})[ \t]+(.+?)[ \t]*#*$")
_UNDERLINE = re.compile(r"^([=~^\"-])\1{2,}$")
_BULLET = re.compile(r"^[ \t]*(?:[*+\u2022\u25cb\u25e6\u25aa-]|\d+[.)])[ \t]+(?=\S)")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]`*]*\s+(?=[\"'(\[`*]?[A-Z\d`])")
_NOT_THE_END = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|approx|[A-Z])|^\d+)\.$", re.I)


@dataclass(frozen=True, slots=True)
class Section:
    """What stands under a heading. `titles` are those of the sections around it, the outermost first, and its own."""

    titles: tuple[str, ...]
    blocks: tuple[str, ...]
    """Paragraphs, lists and code, each with the line breaks that it had, but for markup."""

    @property
    def paragraphs(self) -> list[str]:
        """The prose, each paragraph on one line."""
        return [line for block in self.blocks if is_prose(block) and (line := one_line(block))]


def is_man(text: str) -> bool:
    """Whether it is a rendered manual page."""
    return _MAN_NAME.search(text) is not None


def clean(document: Document) -> str:
    """The text without what says nothing: comments, tags, front matter, lists of links, addresses, headers and footers of pages.

    Code stays as it is.
    """
    text = document.text
    if is_man(text):
        return _spaced(_MAN_EDGE.sub("", text))
    if PurePath(document.name).suffix.lower() not in (".md", ".markdown"):
        return _spaced(text)
    code: list[str] = []
    text = CODE.sub(partial(_set_aside, code), _FRONT_MATTER.sub("", text))
    text = _INLINE.sub(partial(_set_aside, code), _COMMENT.sub("", text))
    for pattern, by in (
        (_NAVIGATION, "\n"),
        (_TAG, ""),
        (_IMAGE, ""),
        (_REFERENCE, ""),
        (_LINK, r"\1"),
        (_LINK, r"\1"),
        (_EMPHASIS, r"\2"),
        (_ESCAPE, r"\1"),
    ):
        text = pattern.sub(by, text)
    while "\0" in text:  # what was set aside may hold what was set aside before
        text = re.sub(r"\0(\d+)\0", lambda found: code[int(found[1])], text)
    return _spaced(text)


def _set_aside(code: list[str], found: re.Match[str]) -> str:
    code.append(found[0])
    return f"\0{len(code) - 1}\0"


def _spaced(text: str) -> str:
    """With one empty line between blocks."""
    return _BLANKS.sub("\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip("\n")


def subject(document: Document) -> str:
    """What the document is about, in its own words: the command of a manual page, the first heading, else the file's name."""
    if is_man(document.text) and (found := re.search(r"^NAME\n\s+([\w.+-]+)", document.text, re.M)):
        return found[1]
    first = next((one for one in sections(document) if one.titles), None)
    return first.titles[0] if first else PurePath(document.name).stem.replace("_", " ")


def sections(document: Document) -> list[Section]:
    """The sections in order; what stands before the first heading has no titles."""
    found: list[tuple[tuple[str, ...], list[str]]] = [((), [])]
    levels: list[tuple[int, str]] = []
    for level, line in _levelled(clean(document), man=is_man(document.text)):
        if level is None:
            found[-1][1].append(line)
            continue
        levels = [(above, title) for above, title in levels if above < level] + [(level, line)]
        found.append((tuple(title for _, title in levels), []))
    return [Section(titles, tuple(blocks("\n".join(lines)))) for titles, lines in found if titles or any(lines)]


def _levelled(text: str, *, man: bool) -> Iterator[tuple[int | None, str]]:
    """Lines with the level of the heading that they are, None for all others."""
    lines = text.split("\n")
    fence = ""
    skip = False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        mark = line.strip()[:3]
        if mark in ("```", "~~~") and (not fence or mark == fence):
            fence = "" if fence else mark
            yield None, line
        elif skip:
            skip = False
        elif fence or not line.strip():
            yield None, line
        elif man:
            indent = len(line) - len(line.lstrip())
            yield _MAN_LEVELS.get(indent), line.strip() if indent in _MAN_LEVELS else line
        elif heading := _HEADING.match(line):
            yield len(heading[1]), heading[2].strip()
        elif line[0].isalnum() and _UNDERLINE.match(following) and len(following) >= len(line.strip()) - 1:
            skip = True
            yield '=-~^"'.index(following[0]) + 1, line.strip()
        else:
            yield None, line


def blocks(text: str) -> Iterator[str]:
    """Paragraphs, lists and whole pieces of code."""
    at = 0
    for code in [*CODE.finditer(text), None]:
        yield from (
            block.strip("\n") for block in _BLANKS.split(text[at : code.start() if code else None]) if block.strip()
        )
        if code:
            yield code[0]
            at = code.end()


def is_prose(block: str) -> bool:
    """Whether it is a paragraph: no code, list, table or quotation of a status."""
    first = block.lstrip()
    return not (first.startswith(("```", "~~~", "|", ">", ".. ")) or _BULLET.match(block)) and bool(
        re.search(r"[^\W\d_]{3}", first)
    )


def items(block: str) -> list[str]:
    """The items of a list, each on one line; nothing of what is none. Those below another item are items too."""
    if not _BULLET.match(block):
        return []
    found: list[list[str]] = []
    for line in block.split("\n"):
        if _BULLET.match(line):
            found.append([_BULLET.sub("", line)])
        else:
            found[-1].append(line)
    return [one_line("\n".join(lines)) for lines in found]


def one_line(text: str) -> str:
    """Its lines joined; a word that was cut at the end of one is whole again."""
    return " ".join(re.sub(r"(?<=\w)\N{HYPHEN}\n\s*", "", re.sub(r"(?<=\w-)\n\s*(?=\w)", "", text)).split())


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph that is on one line."""
    found: list[str] = []
    at = 0
    for gap in _SENTENCE_END.finditer(paragraph):
        piece = paragraph[at : gap.end()].rstrip()
        if not _NOT_THE_END.search(piece):
            found.append(piece)
            at = gap.end()
    return [*found, paragraph[at:]] if paragraph[at:].strip() else found


_WORD = re.compile(r"-{0,2}\w(?:[\w.:/-]*\w)?")
_ENDING = re.compile(r"(?<=\w{4})(?:ing|ed|es|s|ly)$")
_COMMON = frozenset(
    """a about all also an and any are as at be been being but by can could do does did each either for from had has have how if
    in into is it its may might more most must no not of on one only or other our out over should so some such than that the
    their them then there these they this those to too under up use used using was we were what when where whether which while
    who whom whose why will with without would you your""".split()  # noqa: SIM905 - a list of them fills a page
)


def words(text: str) -> list[str]:
    """Its words, in small letters and without common endings."""
    return [_ENDING.sub("", word) for word in _WORD.findall(text.casefold())]


def content_words(text: str) -> list[str]:
    """Those of its words that say what it is about."""
    return [_ENDING.sub("", word) for word in _WORD.findall(text.casefold()) if word not in _COMMON]


def repeated(documents: Sequence[Document]) -> frozenset[str]:
    """The blocks, each on one line, that many of the documents have: they say nothing of any."""
    counts = Counter(
        block for document in documents for block in {one_line(block) for block in blocks(clean(document))}
    )
    many = max(SEVERAL, SHARE * len(documents))
    return frozenset(block for block, count in counts.items() if count >= many)
