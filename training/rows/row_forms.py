"""The forms that a row may have: plain, chat, preference pair, and the field names of well-known data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from ...errors import InvalidRequest
from ...schema import Message, Role

PLAIN = (
    ("prompt", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("question", "answer"),
    ("question", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("text", "label"),
    ("text", "intent"),
)
"""Question and answer, by the names that data sets give them. The first wins; two of the others in one row are ambiguous."""
ALLOWED = (
    "'prompt' and 'answer'; 'messages' (or 'conversations'); 'prompt', 'chosen' and 'rejected'; or, in place of 'prompt' and"
    " 'answer', " + ", ".join(f"'{question}' and '{answer}'" for question, answer in PLAIN[1:])
)
_PAIR = ("user", "assistant")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_BESIDE = ("id", "source", "topic", "context", "group")


def fields_of(record: Any) -> dict[str, Any]:
    """The fields of an Example that a record holds, as they are in an Example; absent ones are left out.

    Raises InvalidRequest, without file and line, where the form is unknown, ambiguous or broken.
    """
    if not isinstance(record, Mapping):
        raise InvalidRequest(f"a row needs 'prompt' and 'answer', so it is a JSON object, not {_kind(record)}.")
    row = {name: value for name, value in record.items() if value is not None}
    fields = {**_form(row), "choices": _choices(row.get("choices") or [])}
    for name in _BESIDE:
        if isinstance(row.get(name), list | Mapping):
            raise InvalidRequest(f"'{name}' is text, not {_kind(row[name])}.")
        if str(row.get(name, "")).strip():
            fields[name] = str(row[name])
    if fields["choices"] and fields["answer"] not in fields["choices"]:
        raise InvalidRequest(f"the answer {fields['answer']!r} is not among the choices.")
    return fields


def _form(row: Mapping[str, Any]) -> dict[str, Any]:
    if "prompt" in row and "answer" in row:
        return {**_asked(row, "prompt", "answer"), "rejected": _text(row, "rejected") if row.get("rejected") else ""}
    if "chosen" in row and "rejected" in row:
        return _preference(row)
    for name in ("messages", "conversations"):
        if name in row:
            return _conversation(_messages(row[name], name), name)
    found = [pair for pair in PLAIN if all(name in row for name in pair)]
    if "instruction" in row:  # then `input` is what the instruction is about
        found = [pair for pair in found if pair[0] != "input"]
    if len(found) > 1:
        names = " or ".join(f"'{question}' and '{answer}'" for question, answer in found)
        raise InvalidRequest(
            f"a row that could be {names} is ambiguous.",
            hint="Name the fields 'prompt' and 'answer', or leave one out.",
        )
    if not found:
        names = ", ".join(f"'{name}'" for name in row) or "no field"
        raise InvalidRequest(
            f"a row needs 'prompt' and 'answer', both text that is not empty; this one has {names}.",
            hint=f"Allowed are {ALLOWED}.",
        )
    return _asked(row, *found[0])


def _asked(row: Mapping[str, Any], question: str, answer: str) -> dict[str, Any]:
    if question == "prompt" and isinstance(row["prompt"], list):  # as TRL has prompts and completions
        turns = _messages(row["prompt"], "prompt")
        given = row[answer]
        ending = _messages(given, answer) if isinstance(given, list) else [Message("assistant", _text(row, answer))]
        return _conversation([*turns, *ending], "prompt")
    prompt = _text(row, question)
    if question == "instruction" and "input" in row:
        about = row["input"]
        if not isinstance(about, str):
            raise InvalidRequest(f"'input' is text, not {_kind(about)}.")
        prompt = f"{prompt}\n\n{about}" if about.strip() else prompt
    return {"prompt": prompt, "answer": _text(row, answer), "history": _history(row.get("history") or [])}


def _preference(row: Mapping[str, Any]) -> dict[str, Any]:
    """A pair: the answers as texts or as messages, the prompt beside them or at the head of both conversations."""
    if isinstance(row["chosen"], list) != isinstance(row["rejected"], list):
        raise InvalidRequest("'chosen' and 'rejected' are both texts or both lists of messages.")
    if not isinstance(row["chosen"], list):
        if "prompt" not in row:
            raise InvalidRequest(f"'chosen' and 'rejected' need their 'prompt'; this row has {', '.join(row)}.")
        return {**_asked(row, "prompt", "chosen"), "rejected": _text(row, "rejected")}
    chosen, rejected = _messages(row["chosen"], "chosen"), _messages(row["rejected"], "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise InvalidRequest(
            "'chosen' and 'rejected' differ before their last message, so they answer different prompts."
        )
    before: list[Message] = []
    if len(chosen) == 1:
        if "prompt" not in row:
            raise InvalidRequest("'chosen' and 'rejected' hold no prompt, and there is no field 'prompt'.")
        given = row["prompt"]
        before = _messages(given, "prompt") if isinstance(given, list) else [Message("user", _text(row, "prompt"))]
    better, worse = _conversation([*before, *chosen], "chosen"), _conversation([*before, *rejected], "rejected")
    return {**better, "rejected": worse["answer"]}


def _conversation(messages: Sequence[Message], name: str) -> dict[str, Any]:
    """The last answer of the assistant, what it answers, and what was before; a turn of the user after it has no answer."""
    last = max((place for place, one in enumerate(messages) if one.role == "assistant"), default=0)
    if last == 0 or messages[last - 1].role != "user":
        raise InvalidRequest(f"'{name}' needs a message of the user that a message of the assistant answers.")
    asked, answer = messages[last - 1].content, messages[last].content
    if not asked.strip() or not answer.strip():
        raise InvalidRequest(f"'{name}': the last answer and what it answers are not empty.")
    return {"prompt": asked, "answer": answer, "history": tuple(messages[: last - 1])}


def _history(value: Any) -> tuple[Message, ...]:
    """Earlier turns: messages, or pairs of what was asked and answered."""
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == len(_PAIR) for pair in value):
        value = [{"role": role, "content": text} for pair in value for role, text in zip(_PAIR, pair, strict=True)]
    return tuple(_messages(value, "history"))


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(choice, str) and choice.strip() for choice in value):
        raise InvalidRequest("'choices' is a list of texts, none of them empty.")
    return tuple(value)


def _messages(value: Any, name: str) -> list[Message]:
    """Messages as {role, content} or as {from, value}."""
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise InvalidRequest(f"'{name}' is a list of messages, each with 'role' and 'content'.")
    messages = []
    for one in value:
        role: Any = one.get("role", one.get("from"))
        content = one.get("content", one.get("value"))
        role = _ROLES.get(role, role) if isinstance(role, str) else role
        if role not in get_args(Role):
            raise InvalidRequest(
                f"'{name}' has a message of the role {role!r}; allowed are {', '.join(get_args(Role))}."
            )
        if not isinstance(content, str):
            raise InvalidRequest(f"'{name}' has a message whose content is {_kind(content)}, not text.")
        messages.append(Message(role, content))
    return messages


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, str):
        raise InvalidRequest(f"'{name}' is text that is not empty.")
    hint = "Give the answer itself, not its number." if isinstance(value, int) and name in ("answer", "label") else None
    raise InvalidRequest(f"a row's question and answer are both text; '{name}' is {_kind(value)}.", hint=hint)


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}.get(
        type(value), "a number"
    )
