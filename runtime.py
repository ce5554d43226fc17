"""The way of a prompt: route, retrieve, dispatch, answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, overload

from .errors import CollegiumError, ContextTooLong, InvalidRequest
from .retrieval import with_context
from .router.words import users_words
from .schema import Card, Context, Decision, Delta, ExpertRequest, Message, Reply, Sampling, Usage
from .serving import Serving
from .settings import Settings

if TYPE_CHECKING:
    from .experts.engine.generation import Generation, Item
    from .models.fetch import Progress
    from .router.explain import Explanation

Prompt = str | Sequence[Message | Mapping[str, Any]]


@dataclass(slots=True)
class Answer:
    """A running answer. The decision is known from the start; iterate for the text; `reply` is whole at the end."""

    decision: Decision
    context: Context
    expert_version: str
    mode: str
    generation: Generation
    timings: dict[str, float]
    started: float
    _text: list[str] = field(default_factory=list)
    _tokens: int = 0
    _last: Delta | None = None

    def __iter__(self) -> Iterator[Delta]:
        try:
            for delta in self.generation:
                self._take(delta)
                yield delta
        finally:
            self.close()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Item] = asyncio.Queue()

        def hand_over(item: Item) -> None:
            try:
                loop.call_soon_threadsafe(items.put_nowait, item)
            except RuntimeError:  # the loop is closed: nobody listens any more
                self.close()

        self.generation.listen(hand_over)
        try:
            while self._last is None:
                item = await items.get()
                if isinstance(item, CollegiumError):
                    raise item
                self._take(item)
                yield item
        finally:
            self.close()

    def close(self) -> None:
        """Stop generating; the reply keeps what has come."""
        self.generation.close()

    @property
    def reply(self) -> Reply:
        """What has been answered so far."""
        return Reply(
            text="".join(self._text),
            decision=self.decision,
            citations=self.context.passages,
            expert_version=self.expert_version,
            mode=self.generation.mode or self.mode,
            usage=Usage(self.generation.prompt_tokens, self._tokens),
            timings=dict(self.timings),
            finish_reason=(self._last.finish_reason if self._last else None) or "cancelled",
            paid=self.generation.paid,
        )

    def _take(self, delta: Delta) -> None:
        now = time.perf_counter() - self.started
        if delta.token_ids:
            self.timings.setdefault("first_token", now)
        self.timings["total"] = now
        self._text.append(delta.text)
        self._tokens += len(delta.token_ids)
        if delta.finish_reason:
            self._last = delta


class Collegium:
    """Many experts behind one call. `open` it, ask it, `close` it (or use `with`)."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    @classmethod
    def open(cls, settings: Settings | None = None, *, progress: Progress | None = None) -> Self:
        """Load models and the live release; the first time, models are fetched, which `progress` is told about."""
        return cls(Serving(settings or Settings.load(), progress))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish what runs and free the models."""
        self._serving.close()

    @property
    def settings(self) -> Settings:
        """What it was opened with."""
        return self._serving.settings

    def experts(self) -> dict[str, Card]:
        """The live experts' cards by name."""
        return dict(self._serving.snapshot().cards)

    @overload
    def route(self, prompt: str) -> Decision: ...
    @overload
    def route(self, prompt: Sequence[Message | Mapping[str, Any]]) -> Decision: ...
    @overload
    def route(self, prompt: list[str]) -> list[Decision]: ...
    def route(self, prompt: Prompt | list[str]) -> Decision | list[Decision]:
        """Who would answer: one decision for a prompt or a conversation, a list for a list of prompts."""
        snapshot = self._serving.snapshot()
        if isinstance(prompt, list) and prompt and all(isinstance(one, str) for one in prompt):
            return [routed.decision for routed in snapshot.route([as_messages(one) for one in prompt])]
        return snapshot.route([as_messages(prompt)])[0].decision  # type: ignore[arg-type]

    def explain(self, prompt: str) -> Explanation:
        """Why the router scores a prompt as it does: the stored prompts nearest to it, and its score against the threshold."""
        return self._serving.snapshot().router.explain(users_words(as_messages(prompt)[-1].content))

    def stream(
        self,
        prompt: Prompt,
        *,
        expert: str | None = None,
        domains: Collection[str] | None = None,
        retrieve: bool = True,
        sampling: Sampling | None = None,
        seed: int | None = None,
        alpha: float | None = None,
        request_id: str = "",
    ) -> Answer:
        """Begin an answer. `expert` names who answers instead of the router; `domains` limits what is weighed.

        `alpha` is how strongly an expert that steers another model does so; for the others it changes nothing.

        Raises UnknownExpert, UnknownDomain, InvalidRequest, ContextTooLong or Overloaded, before any token.
        """
        started = time.perf_counter()
        messages = as_messages(prompt)
        snapshot = self._serving.snapshot()
        routed = snapshot.route([messages], expert=expert, domains=domains)[0]
        decided = time.perf_counter()
        decision, card, chosen = snapshot.dispatch(routed.decision)
        context = snapshot.retrieve(card, routed) if retrieve else Context()
        retrieved = time.perf_counter()
        request = ExpertRequest(
            messages=with_context(messages, context),
            expert=card.version,
            context=context,
            sampling=sampling or self.settings.sampling,
            seed=seed,
            alpha=alpha,
            request_id=request_id,
        )
        timings = {"route": decided - started, "retrieve": retrieved - decided}
        try:
            generation = chosen.start(request)
        except ContextTooLong:
            if not context.passages:
                raise
            context = Context()  # the question matters more than what was found for it
            generation = chosen.start(replace(request, messages=messages, context=context))
        self._serving.note(snapshot, replace(routed, decision=decision), domains)
        return Answer(decision, context, card.version, chosen.mode, generation, timings, started)

    def chat(self, prompt: Prompt, **options: Any) -> Reply:
        """A whole answer; the options are those of `stream`."""
        answer = self.stream(prompt, **options)
        for _ in answer:
            pass
        return answer.reply

    async def aroute(self, prompt: Any) -> Any:
        """`route` without blocking the event loop."""
        return await asyncio.to_thread(self.route, prompt)

    async def astream(self, prompt: Prompt, **options: Any) -> Answer:
        """`stream` without blocking the event loop; use `async for` on the answer."""
        return await asyncio.to_thread(self.stream, prompt, **options)

    async def achat(self, prompt: Prompt, **options: Any) -> Reply:
        """`chat` without blocking the event loop."""
        answer = await self.astream(prompt, **options)
        async for _ in answer:
            pass
        return answer.reply


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt as messages. Raises InvalidRequest that says which message is wrong, and how."""
    if isinstance(prompt, str):
        prompt = (Message("user", prompt),)
    if not isinstance(prompt, Sequence) or not prompt:
        raise InvalidRequest("A prompt is a text or a list of messages that is not empty.")
    messages = tuple(_as_message(one, number) for number, one in enumerate(prompt))
    last = messages[-1]
    if last.role != "user":
        raise InvalidRequest(f"The last message is the {last.role}'s.", hint="End with a message of role 'user'.")
    if not last.content.strip():
        raise InvalidRequest("The prompt is empty.", hint="Write a question.")
    return messages


def _as_message(one: Any, number: int) -> Message:
    role, content = (one.role, one.content) if isinstance(one, Message) else _fields(one, number)
    if role not in ("system", "user", "assistant"):
        raise InvalidRequest(f"messages[{number}] has the role {role!r}.", hint="Allowed: system, user, assistant.")
    if not isinstance(content, str):
        raise InvalidRequest(f"messages[{number}] is not text but {type(content).__name__}.", hint="Send text.")
    if "\x00" in content or any("\ud800" <= character <= "\udfff" for character in content):
        raise InvalidRequest(
            f"messages[{number}] holds a NUL or half a character, so it is not text.", hint="Send text."
        )
    return Message(role, content)


def _fields(one: Any, number: int) -> tuple[Any, Any]:
    if not isinstance(one, Mapping) or "role" not in one or "content" not in one:
        raise InvalidRequest(f"messages[{number}] is not a message.", hint="A message has a role and a content.")
    return one["role"], one["content"]
