"""Token ids to text as they come: never half a character, never past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """Turns ids into text piece by piece; `decode` maps a list of ids to text."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []
        self._shown = 0  # ids whose text has been decoded for good
        self._held = ""  # text that may turn out to begin a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` makes certain; empty while a character or a possible stop string is incomplete."""
        if self.stopped:
            return ""
        self._ids.append(token)
        # Decoding from a little before the new ids keeps the spaces that a tokenizer drops at the start of a text.
        start = max(0, self._shown - 4)
        before = self._decode(self._ids[start : self._shown])
        text = self._decode(self._ids[start:])
        if text.endswith("\ufffd") or len(text) <= len(before):
            return ""
        self._shown = len(self._ids)
        return self._release(self._held + text[len(before) :])

    def finish(self) -> str:
        """What is left at the end, held-back text included."""
        start = max(0, self._shown - 4)
        before = self._decode(self._ids[start : self._shown])
        if self.stopped:
            return ""
        rest = self._release(self._held + self._decode(self._ids[start:])[len(before) :]) + self._held
        self._held, self._shown = "", len(self._ids)
        return rest

    def _release(self, text: str) -> str:
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :] if keep else ""
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
