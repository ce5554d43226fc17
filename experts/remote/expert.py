"""The kind `remote`: a model behind an OpenAI-compatible server, with a small expert of this process.

Where the server gives log-probabilities, they are steered token by token (Liu et al. 2024, "Tuning Language Models by Proxy");
where it does not, only words are exchanged. docs/proxy.md has the modes.
"""

from __future__ import annotations

import asyncio
import logging

from ...errors import CollegiumError
from ...schema import Card, Delta, ExpertRequest, Remote
from ..combination import formula
from ..engine.generation import Generation
from ..kinds import Expert, Host
from ..proxy import Pair, open_pair
from .answer import Asked, RemoteAnswer
from .background import Running, spawn
from .capabilities import Capabilities
from .client import RemoteClient, check_address
from .demonstrations import Demonstrations
from .failures import Spent
from .probing import Probe
from .text import Helper
from .vocabulary import Vocabulary

log = logging.getLogger(__name__)


class RemoteExpert:
    """Answers in one of the modes `remote-full`, `remote-topk` and `remote-text`; a reply says which it was.

    `+expert` or `+partial` after it says that the server failed in mid-answer, and what followed.
    """

    def __init__(
        self, card: Card, spec: Remote, pair: Pair, vocabulary: Vocabulary, demonstrations: Demonstrations | None
    ) -> None:
        self._spec, self._pair, self._vocabulary = spec, pair, vocabulary
        self._client = RemoteClient.of(spec, pair.host.settings)
        self._helper = Helper(pair, demonstrations)
        known = card.evidence.capabilities
        self._can = Capabilities.from_dict(known) if known else None
        self._asking = asyncio.Lock()

    @property
    def mode(self) -> str:
        """How it means to answer; `remote` while it has not asked the server what that can do."""
        if self._spec.mode == "text":
            return "remote-text"
        return self._can.mode if self._can else "remote"

    def start(self, request: ExpertRequest) -> Generation:
        """Begin an answer. Raises what `Pair.rows` and `formula` raise; what the server does is raised by the answer."""
        asked = Asked(request, self._pair.rows(request), formula(self._spec.combination, request.alpha))

        def stop() -> None:
            running.cancel()

        outer = Generation(len(asked.rows["tuned"].prompt), stop)
        spent = Spent(self._pair.host.settings.remote_calls)
        answer = RemoteAnswer(asked, outer, self._client, self._pair, self._helper, self._vocabulary, spent, self.mode)

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is None:
                return
            error = None if task.cancelled() else task.exception()
            answer.end(_last(error))

        running = Running(self._answer(answer), ended)
        return outer

    async def _answer(self, answer: RemoteAnswer) -> None:
        await answer.give(None if self._spec.mode == "text" else self._capabilities)

    async def _capabilities(self) -> Capabilities:
        async with self._asking:
            if self._can is None:
                self._can = await Probe(self._client, self._vocabulary).capabilities()
            return self._can


def _last(error: BaseException | None) -> Delta | CollegiumError:
    """What an answer ends with that did not end by itself: None where it was cancelled."""
    if error is None:
        return Delta("", finish_reason="cancelled")
    if isinstance(error, CollegiumError):
        return error
    log.error("an answer failed", exc_info=error)  # the edge of the loop: others go on
    return CollegiumError(f"The remote expert failed: {type(error).__name__}: {error}")


def open_remote(card: Card, host: Host) -> Expert:
    """The kind `remote`. Raises InvalidRequest where the settings do not allow the server, and what opening the pair raises."""
    spec = card.spec
    assert isinstance(spec, Remote)
    check_address(spec.url, host.settings)
    shown = Demonstrations.load(host.artifacts.verify(spec.demonstrations)) if spec.demonstrations else None
    return RemoteExpert(card, spec, open_pair(card, host, spec), Vocabulary.of(host), shown)


def find_capabilities(spec: Remote, host: Host) -> Capabilities:
    """Ask a server what it can do; blocks. Raises what `Probe.capabilities` and `RemoteClient` raise."""
    return spawn(Probe(RemoteClient.of(spec, host.settings), Vocabulary.of(host)).capabilities()).result()
