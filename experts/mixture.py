"""Several experts of this process answering together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InvalidRequest
from ..schema import ExpertRequest
from .engine.engine import Engine
from .engine.generation import Generation
from .engine.mixing import PosteriorMixture
from .engine.request import Request
from .kinds import Expert, Host, LocalExpert


@dataclass(frozen=True, slots=True)
class Mixture:
    """One answer, each token drawn from the weighted mean of what the experts expect; they all read the token.

    The weights begin as `prior`, and move to the experts that foretell the answer best.
    """

    engine: Engine
    experts: tuple[LocalExpert, ...]
    prior: tuple[float, ...]

    mode: str = "mixture"

    def start(self, request: ExpertRequest) -> Generation:
        """Begin an answer, with a row an expert, each under its own system prompt.

        Usage and repetition penalty are those of the first expert's prompt. Raises what an expert's `row` and the engine's
        `submit` raise: ContextTooLong also where the prompts fit one by one but not together.
        """
        return self.engine.submit(
            Request(
                tuple(expert.row(request) for expert in self.experts),
                PosteriorMixture(self.prior),
                request.sampling,
                seed=request.seed,
                deadline=request.deadline,
            )
        )


def mixture(experts: Sequence[tuple[Expert, float]], host: Host) -> Expert:
    """The experts as one, best first; their weights, which sum to 1, are the prior of a `PosteriorMixture`.

    Raises InvalidRequest where one does not run on the engine of `host`, or the weights do not sum to 1.
    """
    local = []
    for expert, _ in experts:
        if not isinstance(expert, LocalExpert):
            raise InvalidRequest(
                f"An expert of the mode {expert.mode!r} cannot be mixed with others.",
                hint="Only experts on this process's base model can; choose the policy top1.",
            )
        local.append(expert)
    prior = PosteriorMixture([weight for _, weight in experts]).posterior
    return Mixture(host.engine, tuple(local), prior)
