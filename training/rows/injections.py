"""Instructions hidden in texts: orders to the model that reads them, marks of roles, and what people cannot see.

*Not what you've signed up for: Compromising Real-World LLM-Integrated Applications with Indirect Prompt Injection* shows what a
document can make a model do. Text is read as a model reads it: without signs that have no width, with look-alikes made plain,
with what is encoded decoded.
"""

from __future__ import annotations

import base64
import binascii
import html
import re
import unicodedata
from collections.abc import Iterator

_ORDERS = "instructions?|prompts?|rules?|guidelines?|directions?|directives?|orders?|commands?|context|training"
_BEFORE = "previous|prior|above|earlier|preceding|foregoing|existing|original|initial|system|your"
_BEGINS = "you|ignore|disregard|forget|always|never|do\\s+not|from\\s+now|the\\s+assistant|respond|answer|reply|please"
_WORDS = re.compile(
    rf"""\b(?:
      (?:ignore|disregard|forget)\s+(?:\w+\s+){{0,3}}?(?:{_BEFORE})\s+(?:\w+\s+){{0,2}}?(?:{_ORDERS})
    | (?:override|bypass|discard)\s+(?:your|the\s+system)\s+(?:\w+\s+){{0,2}}?(?:{_ORDERS})
    | (?:ignore|disregard|forget)\s+(?:all|everything|anything)\s+(?:\w+\s+){{0,3}}?(?:above|before|previously|earlier|told)
    | (?:ignore|disregard)\s+(?:all|any|these|those)\s+(?:of\s+)?(?:the\s+|your\s+)?(?:instructions|guidelines|directives)
    | (?:reveal|print|repeat|output|show|leak)\s+(?:me\s+)?(?:your|the)\s+(?:\w+\s+)?
        (?:system\s+prompt|hidden\s+prompt|initial\s+instructions)
    | (?:you\s+are|act)\s+now\s+(?:in\s+)?(?:a|an|the|dan|developer|free|unrestricted|no\s+longer)\s+(?:\w+\s+){{0,2}}?
        (?:ai|assistant|model|chatbot|bot|mode|agent|llm|dan)
    | (?:enter|enable|activate)\s+(?:developer|jailbreak|dan|god|debug)\s+mode | do\s+anything\s+now
    | (?:ai|llm|language\s+models?|(?:ai\s+)?assistants?|chatbots?)\s+(?:reading|processing|summari[sz]ing|analy[sz]ing)\s+this
    | (?:do\s+not|don't|never)\s+(?:tell|inform|mention\s+(?:this|it|any\s+of\s+this)\s+to|reveal\s+(?:this|it)\s+to)\s+the\s+user
    | (?:when|whenever|if)\s+(?:the\s+user|a\s+user|anyone|someone)\s+(?:\w+\s+){{1,8}}?(?:always|you\s+must|only)\s+
        (?:answer|reply|respond|say|recommend|output)
    | ignor(?:iere|ieren\s+sie)\s+(?:\w+\s+){{0,2}}?(?:vorherigen|bisherigen|obigen)\s+(?:anweisungen|befehle|regeln)
    | ignor(?:e|ez)\s+(?:\w+\s+){{0,2}}?instructions\s+(?:pr[ée]c[ée]dentes|ci-dessus|ant[ée]rieures)
    | ignora\s+(?:\w+\s+){{0,2}}?(?:instrucciones|istruzioni)\s+(?:anteriores|previas|precedenti)
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
_ROLE_LINE = re.compile(
    r"(?:^|\n)\W{0,3}(?:system(?:\s+(?:prompt|message|note))?|(?:new|real|secret)\s+(?:system\s+)?(?:instructions?|prompt))"
    rf"\s*:\s*(?:{_BEGINS})\b",
    re.IGNORECASE,
)
_ROLE_MARK = re.compile(
    r"<\|(?:im_start|im_end|im_sep|system|user|assistant|end|eot_id|eom_id|endoftext|begin_of_text|start_header_id|end_header_id"
    r"|start_of_role|end_of_role|end_of_text|channel|message|start)\|>"
    r"|\[/?INST\]|<</?SYS>>|\[/?SYSTEM_PROMPT\]|<(?:start|end)_of_turn>|(?:^|\n)#{2,3}\s*(?:system|assistant)\s*:"
    r"|<\uff5c(?:User|Assistant|begin\u2581of\u2581sentence|end\u2581of\u2581sentence)\uff5c>",
    re.IGNORECASE,
)
# What gives an order where nobody sees it need not be as plain as in open text.
_LOOSE = re.compile(
    r"\b(?:ignore|disregard|forget|override|always|never|must|do\s+not|don't|you\s+are|instead|instruct\w*|respond|reply|answer|output"
    r"|say|tell|recommend|execute|send|reveal)\b(?:\W+\w+){2,}",
    re.IGNORECASE,
)
_TO_MODEL = re.compile(
    r"\b(?:you|your|assistant|ai|llm|model|chatbot|user|users|prompts?|instructions?|question|answer(?:s|ing)?|respon(?:d|se|ses)|reply)\b",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"<!--(.*?)(?:-->|\Z)", re.DOTALL)
_UNSEEN_STYLE = re.compile(
    r"<(\w+)\b[^>]*?(?:style\s*=\s*[\"'][^\"']*?(?:display\s*:\s*none|visibility\s*:\s*hidden|opacity\s*:\s*0(?![.\d]*[1-9])"
    r"|font-size\s*:\s*[01](?:px|pt|em|%)?\s*[;\"']|(?<!-)color\s*:\s*(?:white|\#fff(?:fff)?|rgba?\(\s*255\s*,\s*255\s*,\s*255|transparent))"
    r"|\bhidden\b|color\s*=\s*[\"']?(?:white|\#fff(?:fff)?))[^>]*>(.*?)</\1\s*>",
    re.IGNORECASE | re.DOTALL,
)
_BLOB = re.compile(r"(?<![\w+/=-])(?:[A-Za-z0-9+/_-]{24,}={0,2}|(?:[0-9a-fA-F]{2}){16,})(?![\w+/=-])")
_TAGS = re.compile("[\U000e0020-\U000e007f]{4,}")
_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f")  # flags of regions are written with the same signs
_SELECTORS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]{4,}")
_RUN = re.compile("[\u200b-\u200d\u2060-\u2064\ufeff]{8,}")
_UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]"
)
_LOOKALIKES = str.maketrans("аеорсухіјѕԁոɡ", "aeopcyxijsdng")  # noqa: RUF001
_LONGEST_SHOWN = 80


def instructions_in(text: str) -> Iterator[tuple[str, str]]:
    """What in a text gives orders to a model, and why it is odd: (the place, one sentence), each pair once."""
    yield from dict.fromkeys((_shown(what), why) for what, why in _found(text))


def _found(text: str) -> Iterator[tuple[str, str]]:
    for match in _ROLE_MARK.finditer(text):
        yield match[0], "A mark that separates the roles of a conversation stands in the text."
    seen = _plain(text)
    for pattern in (_WORDS, _ROLE_LINE):
        for match in pattern.finditer(seen):
            hidden = "" if match[0] in text else ", written so that a search does not see it"
            yield match[0], f"The text gives an order to the model that reads it{hidden}."
    yield from _out_of_sight(text)


def _out_of_sight(text: str) -> Iterator[tuple[str, str]]:
    """Orders in what a person does not see, and signs that are there only to be unseen."""
    for match in _COMMENT.finditer(text):
        if _is_order(match[1]):
            yield match[1], "A comment, which no reader sees, gives an order to the model."
    for match in _UNSEEN_STYLE.finditer(text):
        if _is_order(match[2]):
            yield match[2], "Text that is styled not to be seen gives an order to the model."
    for match in _BLOB.finditer(text):
        for decoded in _decoded(match[0]):
            if _is_order(decoded):
                yield decoded, "An encoded piece of text gives an order to the model."
    unflagged = _FLAG.sub("", text)
    for match in _TAGS.finditer(unflagged):
        yield "".join(chr(ord(sign) - 0xE0000) for sign in match[0]), "The text holds letters that cannot be seen."
    for match in (*_SELECTORS.finditer(unflagged), *_RUN.finditer(unflagged)):
        yield match[0][:8], "A run of signs that cannot be seen can carry a hidden message."


def _plain(text: str) -> str:
    """The text as a model reads it: no unseen signs, one form of each letter; look-alikes only within Latin words."""
    plain = unicodedata.normalize("NFKC", _UNSEEN.sub("", html.unescape(text)))
    return re.sub(r"\w*[A-Za-z]\w*", lambda word: word[0].translate(_LOOKALIKES), plain)


def _is_order(text: str) -> bool:
    plain = _plain(text)
    return bool(_WORDS.search(plain) or (_LOOSE.search(plain) and _TO_MODEL.search(plain)))


def _decoded(blob: str) -> Iterator[str]:
    """What a blob says in base64 or in hexadecimal digits, where that is text."""
    padded = blob.rstrip("=").replace("-", "+").replace("_", "/")
    padded += "=" * (-len(padded) % 4)
    for decode in (base64.b64decode, bytes.fromhex):
        try:
            text = decode(padded if decode is base64.b64decode else blob).decode("utf-8")
        except (binascii.Error, ValueError):
            continue
        if text.isprintable() or text.replace("\n", " ").isprintable():
            yield text


def _shown(what: str) -> str:
    what = " ".join(what.split())
    return what if len(what) <= _LONGEST_SHOWN else what[: _LONGEST_SHOWN - 3] + "..."
