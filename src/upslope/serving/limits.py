"""What a request must pass before any route sees it: host, origin, key, draining, content type, size, well-formed JSON.

Loopback is no protection by itself: a web page can send requests to it, and, by DNS rebinding, read the answers. So
the Host header must name this server, a page's Origin must be this server's own, and bodies must be JSON, which no
page may send elsewhere without asking first. There are no CORS headers, so the asking fails.
"""

import asyncio
import base64
import binascii
import hmac
import json
import re
from contextlib import nullcontext
from typing import Any, NoReturn

from starlette.datastructures import Headers, State
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from upslope.options import ServeOptions
from upslope.serving.errors import ALWAYS, ApiError, answer

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
        if body is None:
            return None
        return await self.app(scope, _replayed(body, receive), counted)

    def _check(self, request: Request) -> None:
        headers, path = request.headers, request.scope["path"]
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise ApiError(403, f"the Host header {host!r} does not name this server", code="bad_host")
        origin = headers.get("origin", "")
        scheme = headers.get("x-forwarded-proto") or request.scope.get(
            "scheme", "http"
        )  # a page cannot send that header
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
            async with (
                self._parsing if size >= _LARGE else nullcontext()
            ):  # between two the loop sees to everything else
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
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body read already, and then whatever really comes: the client's going away."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pending.pop() if pending else await receive()

    return again
