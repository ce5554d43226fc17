"""Blocks that programs put around a person's words: tags of agents, and JSON schemas of tools. All in linear time."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DROPPED = {"system-reminder", "tool_schema", "available_tools", "environment_details"}
DROPPED_AT_LINE = {"tools", "functions", "context", "documents", "instructions"}
KEPT = {"user_query", "user_message", "user_input"}
KEPT_AT_LINE = {"question", "query", "task"}
"""Ordinary words are tags of pasted XML, too: they count only at the very beginning of a line, or after another tag, and outside
fenced code."""

TAGS = "|".join(sorted(DROPPED | DROPPED_AT_LINE | KEPT | KEPT_AT_LINE))
MARK = re.compile(rf"^ {{0,3}}(?P<fence>```)|<(?P<end>/?)(?P<name>{TAGS})(?:\s[^<>]{{0,200}})?>", re.MULTILINE)
ANNOUNCEMENT = re.compile(
    r"^[ \t#*]*+(?:(?:you (?:have|can|may)|the following|here are|available)\b(?=[^\n]{0,200}\b(?:tools|functions)\b)"
    r"|tools|functions)[^\n]{0,200}:[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)
SCHEMA_KEYS = ('"parameters"', '"input_schema"', '"inputSchema"', '"function"')
OPENING = re.compile(r"[{\[]")
INSIDE = re.compile(r'[{}\[\]]|"(?:[^"\\\n]++|\\.)*+(?P<quote>"?)')
PAIRS = {"{": "}", "[": "]"}
BEFORE = 16
"""Characters before a bracket that say whether it stands on its own or is a value in somebody's code."""
FENCE_BEFORE = re.compile(r"```\w*[ \t]*\n\s*\Z")
FENCE_AFTER = re.compile(r"\s*```")

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Open:
    """A tag that is not closed yet."""

    start: int
    inner: int
    counts: bool
    fenced: bool


@dataclass(frozen=True, slots=True)
class _Block:
    """A tag with what is in it: `text[start:end]`, of which `text[inner[0]:inner[1]]` is within."""

    start: int
    end: int
    inner: Span


def without_tags(text: str) -> str:
    """The text without the blocks that agents put into tags; the same text where there are none."""
    blocks = _blocks(text, DROPPED, DROPPED_AT_LINE)
    return _without(text, [(block.start, block.end) for block in blocks])


def kept(text: str) -> str:
    """What stands in the tags that agents put the person's words into; the same text where there are none."""
    blocks = _blocks(text, KEPT, KEPT_AT_LINE)
    return "\n".join(text[slice(*block.inner)].strip() for block in blocks) if blocks else text


def without_schemas(text: str) -> str:
    """The text without JSON schemas of tools, bare or fenced; the same text where there are none."""
    if not any(key in text for key in SCHEMA_KEYS):
        return text
    return _without(text, [_with_fence(text, span) for span in _brackets(text) if _is_schema(text, span)])


def _without(text: str, spans: Sequence[Span]) -> str:
    """The text without `spans`, in order, and without the lines that announce tools."""
    if not spans:
        return text
    starts, ends = [0, *(end for _, end in spans)], [*(start for start, _ in spans), len(text)]
    left = "\n".join(text[start:end] for start, end in zip(starts, ends, strict=True))
    return ANNOUNCEMENT.sub("", left)


def _blocks(text: str, anywhere: set[str], at_line: set[str]) -> list[_Block]:
    """The outermost blocks in these tags, in order. A tag without its counterpart is text."""
    opened: defaultdict[str, list[_Open]] = defaultdict(list)
    found: list[_Block] = []
    fenced, before = False, 0
    for mark in MARK.finditer(text):
        name, start = mark["name"], mark.start()
        alone = not start or text[start - 1] == "\n" or not text[before:start].strip()
        before = mark.end()
        if mark["fence"]:
            fenced = not fenced
        elif not mark["end"]:
            counts = name in anywhere or (name in at_line and alone and not fenced)
            opened[name].append(_Open(start, mark.end(), counts, fenced))
        elif opened[name]:
            first = opened[name].pop()
            fenced = first.fenced  # quoted text may be cut in the middle of its code
            if first.counts:
                _take_in(found, _Block(first.start, mark.end(), (first.inner, start)))
    return found


def _take_in(found: list[_Block], block: _Block) -> None:
    while found and found[-1].start > block.start:
        found.pop()  # it is inside
    if not found or found[-1].end <= block.start:
        found.append(block)


def _brackets(text: str) -> Iterable[Span]:
    """The outermost pairs of brackets, in order; within one, brackets in JSON strings are text."""
    opened: list[int] = []
    found: list[Span] = []
    at = 0
    while mark := (INSIDE if opened else OPENING).search(text, at):
        at = mark.end()
        first = text[mark.start()]
        if first in PAIRS:
            opened.append(mark.start())
        elif first == '"':
            if not mark["quote"]:
                opened.clear()  # a string that does not end: no JSON
        elif PAIRS[text[start := opened.pop()]] != first:
            opened.clear()
        else:
            while found and found[-1][0] > start:
                found.pop()
            found.append((start, at))
    return found


def _is_schema(text: str, span: Span) -> bool:
    before = text[max(0, span[0] - BEFORE) : span[0]].rstrip(" \t")
    if before and before[-1] not in "\n:,;.>`":  # `tools = [...]` and `call({...})` are code
        return False
    body = text[slice(*span)]
    if not any(key in body for key in SCHEMA_KEYS):
        return False
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return _is_tool(value)


def _is_tool(value: object) -> bool:
    """Whether it is a tool's schema, or a call of one, in the formats of OpenAI, Anthropic and MCP; or a list of them."""
    match value:
        case [*tools] | {"tools": [*tools]} | {"functions": [*tools]}:
            return bool(tools) and all(isinstance(tool, dict) and _is_tool(tool) for tool in tools)
        case {"function": {"name": str()}}:
            return True
        case {"name": str(), "parameters": dict() as schema}:
            pass
        case {"name": str(), "input_schema": dict() as schema} | {"name": str(), "inputSchema": dict() as schema}:
            pass
        case _:
            return False
    return not schema or schema.get("type") == "object" or "properties" in schema


def _with_fence(text: str, span: Span) -> Span:
    """The span with the fence around it, if there is one."""
    start, end = span
    window = text[max(0, start - 2 * BEFORE) : start]
    before, after = FENCE_BEFORE.search(window), FENCE_AFTER.match(text, end)
    return (start - len(window) + before.start(), after.end()) if before and after else span
