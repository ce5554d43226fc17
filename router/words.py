"""What a person wrote, without what a program wrapped around it; for routing only, the expert reads everything.

Agent frameworks put tool schemas, reminders, retrieved pages and instructions of their own around a question. A router that reads
them decides by the framework, not by the person. Code and documents that a person pasted are the person's words, so only what is
plainly a wrapping is taken off. Every stage takes time linear in the text.
"""

from __future__ import annotations

import re

from .wrapping import kept, without_schemas, without_tags

MEANINGFUL = re.compile(r"[^\W_]")
PERSONA = re.compile(r"\s*You are\b((?:[^.!?\n]|\.(?=\S)){1,400})(?:[.!]+(?:\s+|$)|\n+)")
ASSISTANT = re.compile(r"\b(?:assistant|agent|chatbot|AI|language model)\b")
SPEAKER = re.compile(r"^(?:#{1,3} ?)?(?P<who>System|Human|User|Assistant|AI):", re.MULTILINE)
ASKED = re.compile(r"(?<!\S)(?:Question|New input):")
THOUGHT = re.compile(r"\sThought:")
QUOTING = re.compile(
    r"\b(?:us(?:e|ing)|based (?:only |solely )?on|given) (?:only )?the (?:following|provided|above)(?: \w++){0,4} context\b"
    r"|\bcontext information is below\b",
    re.IGNORECASE,
)
SECTION = re.compile(r"(?<!\S)(?:(?P<context>Context)|(?P<question>Question|Query)|(?:Helpful |Final )?Answer):")
HEADER = re.compile(r"^### ?(?P<name>Instruction|Input|Response):", re.MULTILINE)


def users_words(text: str) -> str:
    """What to route by: the person's own words in `text`, or `text` itself where no wrapping is recognised.

    Dropped: blocks in the tags that agents use, JSON schemas of tools, what stands around the question in prompts of the ReAct,
    the retrieval, the Alpaca and the transcript kind (of which the last turn is left), and leading sentences like "You are a
    helpful assistant." A stage that would leave no letter and no digit is left out, so the result is never blank where `text`
    is not.
    """
    for stage in STAGES:
        left = stage(text)
        if left is not text and MEANINGFUL.search(left):
            text = left.strip()
    return text


def _without_persona(text: str) -> str:
    """What follows the sentences at its head that say which assistant the model is."""
    at = 0
    while (sentence := PERSONA.match(text, at)) and ASSISTANT.search(sentence[1]):
        at = sentence.end()
    return text[at:] if at else text


def _last_turn(text: str) -> str:
    """The last thing that the person says in a transcript.

    That is a text that waits for the assistant's turn, or begins with a speaker's name.
    """
    turns = [*SPEAKER.finditer(text)]
    names = {turn["who"] for turn in turns}
    person = "Human" if "Human" in names else "User"  # not both: a person may paste lines that begin with the other
    if person not in names:
        return text
    waits = turns[-1]["who"] in {"Assistant", "AI"} and not text[turns[-1].end() :].strip()
    begins = not text[: turns[0].start()].strip() and (person == "Human" or len(names) > 1)
    if not (waits or begins):
        return text
    last = max(at for at, turn in enumerate(turns) if turn["who"] == person)
    answers = (turn.start() for turn in turns[last + 1 :] if turn["who"] in {"Assistant", "AI"})
    return text[turns[last].end() : next(answers, len(text))]


def _of_react(text: str) -> str:
    """The question of a prompt of LangChain's ReAct agents (Yao et al. 2023), before any thought."""
    tools = text.find("access to the following tools")
    begin = text.find("Begin!", tools) if tools >= 0 else -1
    question = ASKED.search(text, begin) if begin >= 0 else None
    if question is None:
        return text
    thought = THOUGHT.search(text, question.end())
    return text[question.end() : thought.start() if thought else len(text)]


def _of_retrieval(text: str) -> str:
    """The question of a prompt that quotes documents: the last one, as they may hold others, unless it stands before them."""
    opening = QUOTING.search(text)
    sections = [*SECTION.finditer(text, opening.end())] if opening else []
    questions = [at for at, section in enumerate(sections) if section["question"]]
    if not questions:
        return text
    context = next((at for at, section in enumerate(sections) if section["context"]), 0)
    at = questions[0] if questions[0] < context else questions[-1]
    end = sections[at + 1].start() if at + 1 < len(sections) else len(text)
    return text[sections[at].end() : end]


def _of_alpaca(text: str) -> str:
    """The last instruction and its input, of a prompt in the format of Alpaca (Taori et al. 2023)."""
    headers = [*HEADER.finditer(text)]
    at = max((at for at, header in enumerate(headers) if header["name"] == "Instruction"), default=None)
    if at is None or all(header["name"] != "Response" for header in headers[at:]):
        return text
    ends = [header.start() for header in headers[at + 1 :]]
    parts = [
        text[header.end() : end]
        for header, end in zip(headers[at:], ends, strict=False)
        if header["name"] != "Response"
    ]
    return "\n".join(part.strip() for part in parts)


STAGES = (
    without_tags,
    without_schemas,
    kept,
    _without_persona,
    _last_turn,
    _of_react,
    _of_retrieval,
    _of_alpaca,
    _without_persona,
)
