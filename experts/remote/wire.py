"""What is sent to a server for the log-probabilities of tokens, and what its replies mean. No network here.

Two dialects: OpenAI's `/v1/completions`, as vLLM, llama-cpp-python and others have it, and llama.cpp's own `/completion`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .capabilities import Capabilities
from .vocabulary import ID, Named

COMPLETIONS, NATIVE, CHAT = "v1/completions", "completion", "v1/chat/completions"
FORBID = -100.0
"""The bias that rules a token out, as OpenAI's reference has it."""


def body(
    can: Capabilities, prompt: str | Sequence[int], forbidden: int, *, whole_prompt: bool = False
) -> dict[str, Any]:
    """A request for what follows `prompt`; with `whole_prompt` for what follows each of its tokens as well.

    `forbidden` is not to be drawn, if the server can do that: a server may tell nothing of a place where it draws the end.
    """
    asked: dict[str, Any] = {"prompt": prompt if isinstance(prompt, str) else list(prompt), "temperature": 0}
    if can.native:
        asked |= {"n_predict": 1, "n_probs": can.top_k, "cache_prompt": True}
        return asked | ({"logit_bias": [[forbidden, FORBID]]} if can.bias else {})
    asked |= {"max_tokens": 1, "logprobs": can.top_k}
    if can.by_id:
        asked["return_tokens_as_token_ids"] = True
    if can.bias:
        asked["logit_bias"] = {str(forbidden): FORBID}
    if whole_prompt:
        asked |= {"echo": True} if can.prompt_logprobs == "echo" else {"prompt_logprobs": can.top_k}
    return asked


def places(reply: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a reply has of each place in the order of the text, for `named`; the last one follows the prompt's last token.

    Empty where the reply has none: the server draws the end, does not do this, or has a shape of its own for it.
    """
    if "completion_probabilities" in reply:
        return _mappings(reply["completion_probabilities"])
    choice = _choice(reply)
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        logprobs = {}
    after = logprobs["content"] if "content" in logprobs else logprobs.get("top_logprobs")
    return [*_mappings(choice.get("prompt_logprobs")), *_mappings(after)]


def named(place: Mapping[str, Any]) -> Named:
    """The tokens of a place, by id where it has them. Raises LookupError, TypeError or ValueError for another shape."""
    if isinstance(olds := place.get("probs"), list):  # llama.cpp until the end of 2024
        return [(one["tok_str"], math.log(one["prob"])) for one in olds if one["prob"] > 0]
    if isinstance(tops := place.get("top_logprobs"), list):  # llama.cpp since, and as chats have it
        told = [one for one in (*tops, place) if one.get("logprob") is not None]
        return [(one.get("id", one["token"]), float(one["logprob"])) for one in told]
    if all(isinstance(one, Mapping) for one in place.values()):  # vLLM, of a prompt's tokens
        return [(f"{ID}{token}", float(one["logprob"])) for token, one in place.items()]
    return [(text, float(logprob)) for text, logprob in place.items() if logprob is not None]


def ended(reply: Mapping[str, Any]) -> bool:
    """Whether the server drew the end, and nothing before it."""
    choice = _choice(reply)
    stopped = (
        choice.get("finish_reason") == "stop" or reply.get("stop_type") == "eos" or reply.get("stopped_eos") is True
    )
    return stopped and not choice.get("text") and not reply.get("content")


def drawn(reply: Mapping[str, Any]) -> str:
    """The text that the server drew."""
    choice = _choice(reply)
    return str(choice.get("text") or reply.get("content") or "")


def prompt_tokens(reply: Mapping[str, Any]) -> int | None:
    """How many tokens the server read the prompt as, if it says so."""
    usage = reply.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else reply.get("tokens_evaluated")
    return count if isinstance(count, int) else None


def _choice(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first, which is the only one; empty where there is none."""
    choices = _mappings(reply.get("choices"))
    return choices[0] if choices else {}


def _mappings(values: Any) -> list[Mapping[str, Any]]:
    """Those of a list that say something; none of what is no list."""
    return [one for one in values if one and isinstance(one, Mapping)] if isinstance(values, list) else []
