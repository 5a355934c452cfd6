"""Every refusal in the shape OpenAI's clients read: {"error": {"message", "type", "param", "code"}}."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from upslope.errors import ConfigError, DataError, UpslopeError, one_line
from upslope.serving.engine_thread import Stopped
from upslope.serving.service import QueueFull

ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))
"""Headers of every answer that does not set them itself."""
RETRY_SECONDS = 1
GONE = 499  # nginx' number for it; only the metrics see it
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
log = logging.getLogger("upslope.serving")


class ApiError(Exception):
    """A request that is refused: HTTP status, one line that says why, and the parameter that it is about.

    One that may be sent again later (429, 503) has the header Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.message = one_line(message, 1000)
        self.param = None if param is None else _short(param, 100)
        self.type = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
        self.headers |= headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """The client closed its connection before the answer was ready: nobody reads what is sent now."""


def answer(error: ApiError) -> JSONResponse:
    """The response of an error."""
    return JSONResponse(error.body, error.status, error.headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an error, whatever it was; what it cannot know of is logged and not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _from_validation(error)
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, Stopped):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, ConfigError | DataError):
        named = re.match(r"sampling option (\w+)", str(error))
        return ApiError(400, str(error), param=named[1] if named else None)
    if isinstance(error, UpslopeError):
        return ApiError(500, str(error))
    log.error("unexpected error", exc_info=error)
    return ApiError(500, "internal error; the server's log says more")


def _short(text: str, length: int) -> str:
    """What a client sent may come back in a message, but not all of it."""
    return text if len(text) <= length else text[: length - 1] + "\u2026"


def install(app: FastAPI) -> None:
    """Make every error of the application's routes an answer in this shape."""

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientGone):
            return Response(status_code=GONE)
        if isinstance(error, HTTPException):
            return answer(ApiError(error.status_code, _of_http(request, error), headers=error.headers))
        return answer(as_api_error(error))

    for kind in (ApiError, ClientGone, UpslopeError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, refused)


_WHERE = ("body", "query", "path", "header")


def _from_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, by name; "(kind)" in a place is a choice between kinds of body."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in _WHERE and not str(part).startswith("(")]
    param = place[0] if place else None
    name = _short(".".join(place), 200) or "the body"
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{name}: this field is not supported; leave it out", param, "unsupported_field")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    return ApiError(400, f"{name}: {first['msg']}", param)


def _of_http(request: Request, error: HTTPException) -> str:
    if error.status_code == 404:
        return f"no such route: {request.method} {request.url.path}"
    if error.status_code == 405:
        return f"{request.url.path} does not answer {request.method}"
    return str(error.detail)
