"""A conversation as token ids, such that no message can forge a role.

The chat template is rendered with stand-ins for the contents; the template's own text is encoded with special tokens, the
contents without, so that `<|im_start|>` in a prompt or a document stays seven harmless pieces of text.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ContextTooLong
from ..schema import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Private-use characters: absent from templates and replaced in contents, so that a stand-in is unambiguous.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
TURN = 2
"""Messages that leave together where a conversation is too long: a question with its answer."""
_STAND_IN = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class ChatEncoder:
    """Encodes messages with the tokenizer's chat template; a message's text never yields a special token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of the conversation, ending where the assistant's answer begins."""
        stand_ins = [
            {"role": message.role, "content": f"{_OPEN}{number}{_CLOSE}"} for number, message in enumerate(messages)
        ]
        rendered = self._tokenizer.apply_chat_template(
            stand_ins, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        ids: list[int] = []
        for part, piece in enumerate(_STAND_IN.split(str(rendered))):
            is_content = part % 2 == 1
            ids += self.text(messages[int(piece)].content) if is_content else self._template(piece)
        return ids

    def encode_fitting(self, messages: Sequence[Message], room: int) -> list[int]:
        """Token ids of at most `room` tokens: the oldest turns but the system's are left out until the rest fits.

        Raises ContextTooLong where the last message does not fit by itself.
        """
        kept = list(messages)
        oldest = 1 if kept[0].role == "system" else 0
        while len(ids := self.encode(kept)) > room:
            if len(kept) - oldest <= 1:
                raise ContextTooLong(
                    f"The prompt takes {len(ids)} tokens, and {max(room, 0)} fit beside the answer.",
                    hint="Shorten it, or ask for a shorter answer.",
                )
            del kept[oldest : oldest + min(TURN, len(kept) - oldest - 1)]
        return ids

    def text(self, text: str) -> list[int]:
        """Token ids of plain text; special tokens in it are text."""
        return self._ids(text, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def count(self, text: str) -> int:
        """Tokens in `text`."""
        return len(self.text(text))

    def _template(self, text: str) -> list[int]:
        return self._ids(text, split_special_tokens=False)

    def _ids(self, text: str, *, split_special_tokens: bool) -> list[int]:
        # The fast tokenizer keeps the option as its own state: without the lock, another thread's template would make
        # this thread's role tokens special.
        with self._lock:
            ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split_special_tokens)
        return list(ids)
