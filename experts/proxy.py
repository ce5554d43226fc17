"""A large model of this process that stays as it is, steered by a small expert: docs/proxy.md has the formulas."""

from __future__ import annotations

from dataclasses import dataclass

from ..schema import Card, Combination, ExpertRequest, Proxy, Remote
from .combination import Part, formula
from .engine.generation import Generation
from .engine.request import Request, Row
from .engine.slots import Adapter
from .kinds import Expert, Host, load_adapter, prompt_tokens
from .pool import LocalModel


@dataclass(frozen=True, slots=True)
class Pair:
    """A small model and the adapter that makes an expert of it: two rows of one pass."""

    host: Host
    model: LocalModel
    adapter: Adapter
    system: str | None

    def rows(self, request: ExpertRequest, beside: int = 0) -> dict[Part, Row]:
        """`tuned` and `untuned`, where as many rows run `beside` them on their model.

        Raises ContextTooLong where the last message alone does not fit.
        """
        room = self.host.engine.room(self.model.name, rows=2 + beside)
        prompt = prompt_tokens(request, self.system, self.host, self.model.chat, room)
        name = self.model.name
        return {"tuned": Row(prompt, self.adapter, name), "untuned": Row(prompt, None, name)}


@dataclass(frozen=True, slots=True)
class ProxyExpert:
    """The large model and the pair. The system prompt is the expert's; `large` reads it too."""

    pair: Pair
    large: LocalModel
    combination: Combination

    mode: str = "proxy"

    def start(self, request: ExpertRequest) -> Generation:
        """Begin an answer. Raises what `Pair.rows`, `formula` and the engine's `submit` raise."""
        host = self.pair.host
        asked = formula(self.combination, request.alpha)
        same = self.large.name == self.pair.model.name
        room = host.engine.room(self.large.name, rows=3 if same else 1)
        prompt = prompt_tokens(request, self.pair.system, host, self.large.chat, room)
        rows = {"large": Row(prompt, None, self.large.name), **self.pair.rows(request, beside=int(same))}
        return host.engine.submit(
            Request(
                tuple(rows[part] for part in asked.parts),
                asked.combiner,
                request.sampling,
                seed=request.seed,
                deadline=request.deadline,
            )
        )


def open_pair(card: Card, host: Host, spec: Proxy | Remote) -> Pair:
    """The small model of a card, opened, with the card's adapter. Raises what opening them and `formula` raise."""
    formula(spec.combination)  # what is wrong on the card is not said to everybody who asks
    small = host.models.open(spec.small, spec.identities.get(spec.small, ""))
    return Pair(host, small, load_adapter(spec.adapter, card, host, small.name), card.system)


def open_proxy(card: Card, host: Host) -> Expert:
    """The kind `proxy`."""
    spec = card.spec
    assert isinstance(spec, Proxy)
    large = host.models.open(spec.large, spec.identities.get(spec.large, ""))
    return ProxyExpert(open_pair(card, host, spec), large, spec.combination)
