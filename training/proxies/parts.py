"""The parts of a proxied expert in one engine: each alone and together, as they are fitted and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...experts.combination import Formula, Part, formula, with_tail
from ...experts.engine.combine import Identity
from ...experts.engine.request import RemoteRow, Row
from ...experts.engine.slots import Adapter
from ...experts.kinds import Host
from ...models.chat import ChatEncoder
from ...schema import Combination
from ..measuring.answerer import EngineAnswerer, Rows
from ..measuring.evaluate import prompt_of
from ..rows.examples import Example

Prompt = Sequence[int]


@dataclass(frozen=True, slots=True)
class Parts:
    """A large model and a pair: `chat` puts a row to the large one, `small_chat` to the model `small` of the engine.

    `large` makes the large model's row of a prompt, with `tail` one that may hold its likeliest tokens alone; `tuned` is the
    small model's adapter.
    """

    host: Host
    chat: ChatEncoder
    large: Callable[[Prompt], Row | RemoteRow]
    small: str
    small_chat: ChatEncoder
    tuned: Adapter
    tail: bool = False

    def together(self, combination: Combination, rows: Sequence[Example]) -> EngineAnswerer:
        """The proxied expert, for these rows."""
        return self._answerer(lambda: formula(combination), rows)

    def alone(self, part: Part, rows: Sequence[Example]) -> EngineAnswerer:
        """One part by itself, for these rows."""
        return self._answerer(lambda: Formula((part,), Identity()), rows)

    def rows(self, parts: Sequence[Part], rows: Sequence[Example]) -> Callable[[Prompt], Rows]:
        """What makes the engine's rows of a prompt that was put to the large model; the small one has a template of its own."""
        retold = {tuple(prompt_of(row, self.chat)): prompt_of(row, self.small_chat) for row in rows}
        makers: Mapping[Part, Callable[[Prompt], Row | RemoteRow]] = {
            "large": self.large,
            "tuned": lambda prompt: Row(retold[tuple(prompt)], self.tuned, self.small),
            "untuned": lambda prompt: Row(retold[tuple(prompt)], None, self.small),
        }
        return lambda prompt: tuple(makers[part](prompt) for part in parts)

    def _answerer(self, make: Callable[[], Formula], rows: Sequence[Example]) -> EngineAnswerer:
        def made() -> Formula:
            known = make()
            return with_tail(known) if self.tail and "large" in known.parts else known

        return EngineAnswerer(self.host.engine, self.rows(made().parts, rows), lambda: made().combiner)
