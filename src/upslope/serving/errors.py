"""What a request must pass before any route sees it, and every refusal in the shape that OpenAI's clients read.

That shape is {"error": {"message", "type", "param", "code"}}. The Guard looks at host, origin, key, draining, content
type, size, well-formed JSON. Loopback is no protection by itself: a web page can send requests to it, and, by DNS
rebinding, read the answers. So the Host header must name this server, a page's Origin must be this server's own, and
bodies must be JSON, which no page may send elsewhere without asking first. There are no CORS headers, so the asking
fails.
"""

import asyncio
import base64
import binascii
import hmac
import json
import logging
import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NoReturn

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, State
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from upslope.errors import ConfigError, DataError, UpslopeError, one_line
from upslope.options import ServeOptions
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
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _from_validation(error)
        case QueueFull():
            return ApiError(429, str(error), code="queue_full")
        case Stopped():
            return ApiError(503, str(error), code="shutting_down")
        case ConfigError() | DataError():
            named = re.match(r"sampling option (\w+)", str(error))
            return ApiError(400, str(error), param=named[1] if named else None)
        case UpslopeError():
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
            path = request.url.path
            known = {404: f"no such route: {request.method} {path}", 405: f"{path} does not answer {request.method}"}
            says = known.get(error.status_code, str(error.detail))
            return answer(ApiError(error.status_code, says, headers=error.headers))
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


LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
OPEN_ROUTES = frozenset({"/health"})
DRAIN_ROUTES = frozenset({"/health", "/metrics"})
SMALLER = {"/admin/weights": 2**16, "/tokenize": 2**20, "/detokenize": 2**20}
"""Bytes that these routes take at most, whatever --max-body-mb says: what they do is not bounded by the context."""
BODY_SECONDS = 60.0
MAX_DEPTH, MAX_PARTS, MAX_VALUES = 100, 25_000, 500_000
"""Objects and lists in one another, and all together (two thousand messages with calls have half of that); values."""
MAX_HELD = 256 * 2**20
"""Bytes of bodies that are being read at one time."""
_CLOSE = {"Connection": "close"}
_LARGE = 2**16  # bytes from which a body is parsed while no other one is
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_DISCARDED = 64 * 2**20  # bytes of a body too large that are read and dropped, so that the client sees the answer


class Guard:
    """ASGI middleware around the whole application, by whose `state` it goes: settings, metrics, draining.

    The key is asked for on every route but /health, as a bearer token or as the password of HTTP Basic (which a browser
    asks its user for when a page is opened).
    """

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.state = app, state
        settings: ServeOptions = state.settings
        self.key = None if settings.key is None else settings.key.strip().encode("utf-8")
        self.hosts = {*LOOPBACK_NAMES, settings.host} if settings.on_loopback else None  # None: any
        self.max_body = int(settings.max_body_mb * 2**20)
        self._held, self._parsing = 0, asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or hand on with the body read."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in ALWAYS if pair[0] not in given)]
                route, model = getattr(scope.get("route"), "path", "other"), scope.get("state", {}).get("model", "")
                self.state.metrics.answered(route, message["status"], model)
            await send(message)

        request = Request(scope, receive)
        try:
            self._check(request)
            body = await self.read(request)
        except ApiError as error:
            return await answer(error)(scope, receive, counted)
        if body is not None:
            await self.app(scope, _replayed(body, receive), counted)

    def _check(self, request: Request) -> None:
        headers, path = request.headers, request.scope["path"]
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise ApiError(403, f"the Host header {host!r} does not name this server", code="bad_host")
        origin = headers.get("origin", "")
        scheme = headers.get("x-forwarded-proto") or request.scope.get("scheme", "http")  # no page can send that one
        if origin and request.method not in ("GET", "HEAD") and origin != f"{scheme}://{host}":
            raise ApiError(403, f"a page of {origin!r} may not send requests here", code="bad_origin")
        if self.key is not None and path not in OPEN_ROUTES:
            self._check_key(headers)
        if path not in DRAIN_ROUTES and self.state.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers=_CLOSE)

    def _check_key(self, headers: Headers) -> None:
        assert self.key is not None
        authorization = headers.get("authorization", "").encode("latin-1")
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                given = b""
        elif scheme.lower() != b"bearer":
            given = b""
        if not hmac.compare_digest(given.strip(), self.key):
            says = "wrong API key" if authorization else "no API key: send it as Authorization: Bearer KEY"
            page = "text/html" in headers.get("accept", "")
            wants = {"WWW-Authenticate": 'Basic realm="upslope", charset="UTF-8"' if page else "Bearer"}
            raise ApiError(401, says, code="invalid_api_key", headers=wants)

    async def read(self, request: Request) -> bytes | None:
        """The whole body, well-formed where there is one; None when the client goes away before its end.

        ApiError 413: too large. 408: too slow. 415: no JSON. 503: too many are being read. 400: by parse_json.
        """
        most = min(self.max_body, SMALLER.get(request.scope["path"], self.max_body))
        says = f"the body has more than the {most} bytes that are allowed (--max-body-mb)"
        hopeless = ApiError(413, says, code="body_too_large", headers=_CLOSE)
        length = request.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and len(length) < 20 and int(length) > most + _DISCARDED:
            raise hopeless
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size, self._held = size + len(part), self._held + len(part)
                    if self._held > MAX_HELD:
                        busy = "too many bodies are being read; send it again"
                        raise ApiError(503, busy, code="busy", headers=_CLOSE)
                    if size <= most:
                        parts.append(part)
                    elif size > most + _DISCARDED:
                        raise hopeless
            if size > most:
                raise ApiError(413, says, code="body_too_large")
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if size and kind != "application/json":
                raise ApiError(415, f"the body's Content-Type is {kind or 'missing'!r}; send application/json")
            body = b"".join(parts)
            # between two large ones the loop sees to everything else
            async with self._parsing if size >= _LARGE else nullcontext():
                if body:
                    parse_json(body)
            return body
        except ClientDisconnect:
            return None
        except TimeoutError as error:
            says = f"the body did not come within {BODY_SECONDS:g} s"
            raise ApiError(408, says, code="body_too_slow", headers=_CLOSE) from error
        finally:
            self._held -= size


def parse_json(body: bytes) -> Any:
    """The value of a JSON text. ApiError 400: not UTF-8, NaN or Infinity, lone surrogates, too deep, too many parts."""
    _check_counts(body)
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise ApiError(400, "the body has half of a surrogate pair, which is no character") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH:
        _check_depth(value)
    return value


def _check_counts(body: bytes) -> None:
    """Before anything is made of it: the parts and values of a JSON text, counted outside its strings."""
    parts, values = _counts(body)
    if parts > MAX_PARTS or values > MAX_VALUES:
        parts, values = _counts(_STRINGS.sub(b"", body))
    if parts > MAX_PARTS or values > MAX_VALUES:
        says = f"the body holds {parts} objects and lists and {values} values; {MAX_PARTS} and {MAX_VALUES} are allowed"
        raise ApiError(400, says, code="body_too_complex")


def _counts(body: bytes) -> tuple[int, int]:
    return body.count(b"{") + body.count(b"["), body.count(b",")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ApiError(400, f"the body is nested too deeply (more than {MAX_DEPTH} levels)")
        level = [item for part in level for item in (part.values() if isinstance(part, dict) else part)]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _name(host: str) -> str:
    """The host name in a Host header, without the port and without an IPv6 address's brackets."""
    name = host[1:].partition("]") if host.startswith("[") else host.partition(":")
    return name[0].lower()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body read already, and then whatever really comes: the client's going away."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pending.pop() if pending else await receive()

    return again
