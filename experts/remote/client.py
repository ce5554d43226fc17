"""Requests to one model of one server: limited to allowed hosts, retried, counted, and stopped while the server is down."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from ...errors import InvalidRequest, RemoteUnavailable
from ...schema import Remote
from ...settings import Settings
from .background import connections
from .breaker import breaker
from .failures import Failed, Spent

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
Body = dict[str, Any]

_MANY, _SERVER, _CLIENT, _OK = 429, 500, 400, 200
_SAYS_NOTHING = (401, 403, _MANY, 502, 503, 504)
"""Statuses that do not depend on what is asked for."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0
_SHOWN = 300
"""Characters of a server's own words in an error."""


@dataclass(frozen=True, slots=True)
class RemoteClient:
    """Raises InvalidRequest where the address is not one that the settings allow."""

    url: str
    model: str
    key_env: str
    settings: Settings

    def __post_init__(self) -> None:
        check_address(self.url, self.settings)

    @classmethod
    def of(cls, spec: Remote, settings: Settings) -> RemoteClient:
        """The client for what a card names."""
        return cls(spec.url, spec.model, spec.key_env, settings)

    async def post(self, path: str, body: Mapping[str, Any], spent: Spent) -> Body:
        """The reply to one request, `path` below the server's root, as in `v1/completions`.

        Raises InvalidRequest where the server says that it does not do this (4xx), RemoteUnavailable where it fails.
        """

        async def once() -> Body:
            response = await connections().send(self._request(path, body))
            _check(response)
            return _parsed(response, response.text)

        reply = await self._insist(once, spent)
        spent.take(reply)
        return reply

    async def ask(self, path: str, body: Mapping[str, Any], spent: Spent) -> Body | None:
        """As `post`, for what a server may not be able to do: None where it answers with an error.

        Some servers break (500) on what they cannot do, so that says the same as a refusal; one that is starting says nothing.
        """

        async def once() -> Body | None:
            response = await connections().send(self._request(path, body))
            if response.status_code in _SAYS_NOTHING:
                _check(response)
            return _parsed(response, response.text) if response.status_code == _OK else None

        reply = await self._insist(once, spent)
        spent.take(reply)
        return reply

    async def stream(self, path: str, body: Mapping[str, Any], spent: Spent) -> AsyncGenerator[Body, None]:
        """The events of a streamed reply. Nothing is asked again once it has begun; raises what `post` raises."""

        async def begin() -> httpx.Response:
            response = await connections().send(self._request(path, body), stream=True)
            if response.status_code != _OK:
                try:
                    await response.aread()
                finally:
                    await response.aclose()
                _check(response)
            return response

        response = await self._insist(begin, spent)
        last: Body = {}
        try:
            with translated(self.url):
                async for line in response.aiter_lines():
                    name, _, data = line.partition(":")
                    if name != "data" or not data.strip():
                        continue
                    if data.strip() == "[DONE]":
                        return
                    event = _parsed(response, data)
                    last = event if event.get("usage") else last  # some servers count on in each event
                    yield event
        except Failed as failed:
            raise failed.error from None
        finally:
            spent.take(last)
            await response.aclose()

    def _request(self, path: str, body: Mapping[str, Any]) -> httpx.Request:
        key = os.environ.get(self.key_env, "").strip() if self.key_env else ""  # files of keys end in a newline
        if self.key_env and not (key and key.isascii() and key.isprintable()):  # an error of httpx would show the key
            raise RemoteUnavailable(
                f"The key for {self.url} is missing, or is not plain text.",
                hint=f"Set the environment variable {self.key_env}.",
            )
        root = self.url.rstrip("/").removesuffix("/v1")
        return connections().build_request(
            "POST",
            f"{root}/{path}",
            json=dict(body) | {"model": self.model},
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self.settings.remote_timeout,
        )

    async def _insist(self, once: Callable[[], Awaitable[T]], spent: Spent) -> T:
        """Ask until it works, is not worth asking again, or has been asked often enough. Each time counts, and is paid for."""
        from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
        from tenacity.wait import wait_exponential, wait_random

        growing = wait_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE) + wait_random(0, _FIRST_PAUSE)

        def pause(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked_for = error.pause if isinstance(error, Failed) else None
            return growing(state) if asked_for is None else asked_for

        attempts = AsyncRetrying(
            stop=stop_after_attempt(self.settings.remote_retries + 1),
            wait=pause,
            retry=retry_if_exception(lambda error: isinstance(error, Failed) and error.again(self.settings)),
            reraise=True,
        )

        async def attempt() -> T:
            spent.call()
            with breaker(self.url, self.model).calling(), translated(self.url):
                return await once()

        try:
            return await attempts(attempt)
        except Failed as failed:
            raise failed.error from None


def check_address(url: str, settings: Settings) -> None:
    """Raises InvalidRequest where experts may not be sent there."""
    try:
        parts = urlsplit(url)
        readable = url.isprintable() and parts.port != 0  # a port that is none raises
    except ValueError:
        readable = False
    if not readable:  # it is not shown: it may hold a password
        raise InvalidRequest("The address of the server cannot be read.", hint="Write http://host:port/v1.")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InvalidRequest(
            f"{parts.hostname or 'This'} is not the address of a server.", hint="Begin with http:// or https://."
        )
    if parts.username or parts.password:
        raise InvalidRequest(
            f"The address of {parts.hostname} holds a name or a password.",
            hint="Put the key into an environment variable, and name that in key_env.",
        )
    if parts.hostname not in settings.remote_hosts:
        raise InvalidRequest(
            f"Prompts may not be sent to {parts.hostname}: the setting remote_hosts allows "
            f"{', '.join(settings.remote_hosts) or 'no host'}.",
            hint="Add it there, if prompts may leave for it.",
        )


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """What goes wrong on the way becomes `Failed`; what is not known goes through."""
    import httpx

    try:
        yield
    except httpx.TimeoutException:
        raise Failed(_error(f"{url} does not answer in time."), counts=True) from None
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise Failed(_error(f"{url} cannot be reached: {type(error).__name__}: {error}."), counts=True) from None


def _error(message: str) -> RemoteUnavailable:
    return RemoteUnavailable(message, hint="See whether the server runs, or try again in a while.")


@contextlib.contextmanager
def understood(url: str) -> Iterator[None]:
    """Around what reads a reply: one of another shape than it should have becomes RemoteUnavailable."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise RemoteUnavailable(
            f"{url} answers what cannot be read: {type(error).__name__}: {error}.",
            hint="See whether it speaks OpenAI's API, or take the mode text.",
        ) from error


def _said(response: httpx.Response, text: str) -> str:
    """The server's own words, as an error shows them: without the key, which some repeat."""
    key = response.request.headers.get("authorization", "").removeprefix("Bearer ")
    words = text.replace(key, "***") if key else text
    return " ".join(words.split())[:_SHOWN]


def _check(response: httpx.Response) -> None:
    """Raises what a status other than 200 means."""
    status, url = response.status_code, str(response.request.url)
    if status == _OK:
        return
    said = f"{url} answers {status}: {_said(response, response.text)}"
    if status == _MANY:
        raise Failed(_error(said), pause=_pause(response))
    if status >= _SERVER:
        raise Failed(_error(said), pause=_pause(response), counts=True)
    if status in (401, 403):
        raise RemoteUnavailable(
            said, hint="The key may be wrong: key_env on the card names the variable that holds it."
        )
    if status >= _CLIENT:
        raise InvalidRequest(said, hint="The server does not do this.")
    raise RemoteUnavailable(said, hint="Give the address that answers by itself: redirects are not followed.")


def _pause(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait for; None where it does not say, or gives a date."""
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def _parsed(response: httpx.Response, text: str) -> Body:
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise Failed(_error(f"The server answers what is no JSON object: {_said(response, text)!r}."))
    error = body.get("error")
    if error:
        raise Failed(_error(f"The server breaks off: {_said(response, str(error))}"), counts=True)
    return body
