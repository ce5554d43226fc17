"""Whatever goes wrong, as an HTTP reply in OpenAI's shape."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..errors import CollegiumError
from .incoming import Options

log = logging.getLogger(__name__)

RETRY_AFTER = 2
"""Seconds after which what is retryable is worth another try."""

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
_PARAMS = {
    "model_not_found": "model",
    "context_length_exceeded": "messages",
    "domain_not_found": "collegium.domains",
}


class ErrorDetails(BaseModel):
    """What was wrong and what to do about it; `param` names the field that it is about."""

    message: str
    type: str
    param: str | None = None
    code: str


class ErrorBody(BaseModel):
    """OpenAI's error."""

    error: ErrorDetails


def install(app: FastAPI) -> None:
    """Answer every error of `app` with an `ErrorBody`."""
    app.add_exception_handler(CollegiumError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


def error_to_dict(error: Exception) -> dict[str, Any]:
    """The fields of `ErrorBody`; of an error that is not ours nothing but that there was one."""
    if not isinstance(error, CollegiumError):
        error = CollegiumError("The server failed.", hint="Its log says why.")
    return _body(error.status, str(error), error.code, _PARAMS.get(error.code))


def _body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    # What a client sent may stand in the message, and a lone surrogate in it could not be sent back.
    message = message.encode("utf-8", "replace").decode()
    details = ErrorDetails(message=message, type=_type(status), param=param, code=code)
    return ErrorBody(error=details).model_dump()


def _type(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"


def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, CollegiumError)
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not error.retryable:
        log.error("%s: %s", error.code, error)
    headers = {"Retry-After": str(RETRY_AFTER)} if error.retryable else None
    return JSONResponse(error_to_dict(error), error.status, headers)


def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status, message = error.status_code, error.detail
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        message = f"There is no {request.method} {request.url.path}."
    return JSONResponse(_body(status, message, _CODES.get(status, "invalid_request")), status, error.headers)


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # It is raised again after this reply, and the server logs it with its traceback.
    return JSONResponse(error_to_dict(error), HTTPStatus.INTERNAL_SERVER_ERROR)


def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    message = " ".join(_explain(problem) for problem in problems[:3])
    param = _field(problems[0]["loc"]) or None
    return JSONResponse(_body(HTTPStatus.BAD_REQUEST, message, "invalid_request", param), HTTPStatus.BAD_REQUEST)


def _explain(problem: dict[str, Any]) -> str:
    """One sentence on one of pydantic's findings. It quotes names and choices, never what was written in a prompt."""
    field = _field(problem["loc"])
    if problem["type"] == "json_invalid":
        return f"The body is not JSON: {problem['ctx']['error']} at character {problem['loc'][-1]}."
    if not field:
        return "The body is not a JSON object sent with Content-Type: application/json."
    if problem["type"] == "extra_forbidden":
        return f"Unknown field {field!r}. Known in collegium: {', '.join(Options.model_fields)}."
    reason = problem["msg"].removeprefix("Value error, ")
    given = f" (got {str(problem['input'])[:40]!r})" if problem["type"] == "literal_error" else ""
    return f"{field}: {reason}{given}."


def _field(loc: Sequence[str | int]) -> str:
    """`messages[0].content` of ("body", "messages", 0, "content"); the forms of `input` are no part of the name."""
    parts = [part for at, part in enumerate(loc[1:]) if not (at == 1 and loc[1] == "input" and isinstance(part, str))]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
