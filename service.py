"""The endpoint: OpenAI's chat API over HTTP, and the router's decisions."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .endpoint import errors as http_errors
from .endpoint import jobs
from .endpoint.completions import EventStream, complete
from .endpoint.errors import ErrorBody
from .endpoint.incoming import ChatRequest, RouteRequest
from .endpoint.wire import (
    AUTO,
    Completion,
    ModelBody,
    ModelList,
    RouteReply,
    Status,
    auto_body,
    decision_to_dict,
    model_body,
)
from .errors import CollegiumError, ModelUnavailable, SettingsError, UnknownExpert
from .runtime import Collegium
from .settings import Settings

log = logging.getLogger(__name__)

BODY_LIMIT = 4 * 2**20
"""Bytes of a request's body."""

SHUTDOWN_SECONDS = 10
"""How long answers that run may go on when the server is told to stop."""

router = APIRouter(responses={status: {"model": ErrorBody} for status in (400, 404, 413, 429, 500, 503)})


class Source:
    """Where requests get their Collegium: one that was handed in, or one that a thread of its own opens."""

    def __init__(self, settings: Settings, collegium: Collegium | None) -> None:
        self._settings = settings
        self._collegium = collegium
        self._owns = collegium is None
        self._failure: ModelUnavailable | None = None
        self._closed = False
        self._lock = threading.Lock()

    def get(self) -> Collegium:
        """What answers. Raises ModelUnavailable while there is nothing, and for good where opening failed."""
        if self._collegium is not None:
            return self._collegium
        raise self._failure or ModelUnavailable("The models are being loaded.", hint="Try again in a few seconds.")

    def open(self) -> None:
        """Begin to open; returns at once."""
        if self._owns:
            # A daemon, so that a download that hangs does not keep the process alive.
            threading.Thread(target=self._open, name="collegium-open", daemon=True).start()

    def close(self) -> None:
        """Close what was opened here; what is being opened still is closed as soon as it is."""
        with self._lock:
            self._closed = True
        if self._owns and self._collegium is not None:
            self._collegium.close()

    def _open(self) -> None:
        started = time.perf_counter()
        try:
            collegium = Collegium.open(self._settings)
        except CollegiumError as error:
            self._fail(error)
            return
        except Exception as error:  # the edge of the thread: the server lives on and says why it cannot answer
            log.exception("opening failed")
            self._fail(CollegiumError(f"{type(error).__name__}: {error}"))
            return
        with self._lock:
            if self._closed:
                collegium.close()
                return
            self._collegium = collegium
        log.info("Ready after %.1f s. %s", time.perf_counter() - started, _how_to_use(self._settings))

    def _fail(self, error: CollegiumError) -> None:
        log.error("%s", error)
        failure = ModelUnavailable(f"The server could not start: {error.message}", hint=error.hint)
        failure.code, failure.retryable = error.code, False
        self._failure = failure


def create_app(settings: Settings | None = None, *, collegium: Collegium | None = None) -> FastAPI:
    """The ASGI application, on `collegium` if one is given, else on one that is opened with `settings`.

    Raises SettingsError where settings are not given and those of the environment are wrong.
    """
    settings = settings or (collegium.settings if collegium else Settings.load())
    source = Source(settings, collegium)
    desk = jobs.Desk(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        source.open()
        keeper = asyncio.create_task(desk.keep_working())
        yield
        keeper.cancel()
        await asyncio.to_thread(desk.close)
        await asyncio.to_thread(source.close)

    app = FastAPI(title="Collegium", summary="Many domain experts behind one endpoint.", lifespan=lifespan)
    app.state.source = source
    app.state.desk = desk
    app.include_router(router)
    app.include_router(jobs.router)
    app.add_middleware(BodyLimit)
    http_errors.install(app)
    return app


class BodyLimit:
    """Refuses bodies above `BODY_LIMIT`, whatever their Content-Length says."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what the application reads."""
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size <= BODY_LIMIT:
                return message
            while message.get("more_body"):  # a client that is still sending would not see the reply
                message = await receive()
            raise HTTPException(413, f"The body is longer than {BODY_LIMIT} bytes.")

        await self._app(scope, counted, send)


async def _ready(request: Request) -> Collegium:
    source: Source = request.app.state.source
    return source.get()


Ready = Annotated[Collegium, Depends(_ready)]


@router.get("/healthz")
async def healthz() -> Status:
    """Whether the server lives."""
    return Status(status="alive")


@router.get("/readyz")
async def readyz(collegium: Ready) -> Status:
    """Whether prompts are answered; 503 while models are loaded, or where that failed."""
    return Status(status="ready")


@router.get("/v1/models")
def models(collegium: Ready) -> ModelList:
    """`auto` and the live experts."""
    return ModelList(data=[auto_body(), *(model_body(name, card) for name, card in collegium.experts().items())])


@router.get("/v1/models/{name:path}")
def model(name: str, collegium: Ready) -> ModelBody:
    """One of them, by its name or its version."""
    if name == AUTO:
        return auto_body()
    experts = collegium.experts()
    for alias, card in experts.items():
        if name in (alias, card.version):
            return model_body(alias, card)
    raise UnknownExpert(f"No expert is named {name!r}.", hint=f"Known: {', '.join(sorted(experts))}.")


@router.post("/v1/route")
async def route(body: RouteRequest, collegium: Ready) -> RouteReply:
    """Who would answer, without an answer."""
    decided = await collegium.aroute(body.prompt)
    decisions = decided if isinstance(decided, list) else [decided]
    return RouteReply.model_validate({"decisions": [decision_to_dict(decision) for decision in decisions]})


@router.post("/v1/chat/completions", response_model=Completion)
async def chat(body: ChatRequest, request: Request, collegium: Ready) -> Completion | EventStream:
    """OpenAI's chat completion, whole or as a stream of server-sent events."""
    return await complete(body, request, collegium)


def run(settings: Settings) -> None:
    """Serve on `settings.host` and `settings.port` until told to stop.

    Raises SettingsError for a host that others can reach.
    """
    import uvicorn
    from uvicorn.config import LOGGING_CONFIG

    if not _is_loopback(settings.host):
        raise SettingsError(
            f"The host {settings.host!r} can be reached from elsewhere, and anybody who reaches it could use it.",
            hint="Keys come first, and there are none yet: set host to 127.0.0.1, ::1 or localhost.",
        )
    ours = {"collegium": {"handlers": ["default"], "level": "INFO", "propagate": False}}
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=LOGGING_CONFIG | {"loggers": LOGGING_CONFIG["loggers"] | ours},
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _how_to_use(settings: Settings) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}/v1"
    return f'Use it with: openai.OpenAI(base_url="{url}", api_key="none"), model="{AUTO}"'
