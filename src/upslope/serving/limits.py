"""What a request must pass before any route sees it: host, origin, key, draining, content type, size, well-formed JSON.

Loopback is no protection by itself: a web page can send requests to it, and, by DNS rebinding, read the answers. So
the Host header must name this server, a page's Origin must be this server's own, and bodies must be JSON, which no
page may send elsewhere without asking first. There are no CORS headers, so the asking fails.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NoReturn

from upslope.serving.errors import RETRY_SECONDS, ApiError, answer
from upslope.serving.metrics import Metrics

__all__ = ["Guard", "parse_json"]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN_ROUTES = frozenset({"/health"})
DRAIN_ROUTES = frozenset({"/health", "/metrics"})
_DISCARDED = 64 * 2**20  # bytes of a body too large that are read and dropped, so that the client sees the answer


class Guard:
    """ASGI middleware around the whole application.

    key: asked for on every route but /health, as a bearer token or as the password of HTTP Basic (which a browser asks
    its user for when a page is opened); None: no key. hosts: the names a Host header may have; None: any. max_body:
    bytes. `draining` says whether new requests are turned away.
    """

    def __init__(
        self,
        app: Any,
        *,
        key: str | None,
        hosts: frozenset[str] | None,
        max_body: int,
        draining: Callable[[], bool],
        metrics: Metrics,
    ) -> None:
        self.app, self.hosts, self.max_body, self.draining, self.metrics = app, hosts, max_body, draining, metrics
        self.key = None if key is None else key.strip().encode("utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or hand on with the body read."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.answered(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        try:
            headers = dict(reversed(scope["headers"]))
            self._check(scope, headers)
            body = await self._read(scope, headers, receive)
        except ApiError as error:
            return await answer(error)(scope, receive, counted)
        if body is None:
            return None
        return await self.app(scope, _replayed(body, receive), counted)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise ApiError(403, f"the Host header {host!r} does not name this server", code="bad_host")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and scope["method"] not in ("GET", "HEAD") and origin.partition("://")[2] != host:
            raise ApiError(403, f"a page of {origin!r} may not send requests here", code="bad_origin")
        path = scope["path"]
        if self.key is not None and path not in OPEN_ROUTES:
            self._check_key(headers.get(b"authorization", b""), page=b"text/html" in headers.get(b"accept", b""))
        if path not in DRAIN_ROUTES and self.draining():
            retry = {"Retry-After": str(RETRY_SECONDS), "Connection": "close"}
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers=retry)

    def _check_key(self, authorization: bytes, *, page: bool) -> None:
        assert self.key is not None
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
            wants = {"WWW-Authenticate": 'Basic realm="upslope", charset="UTF-8"' if page else "Bearer"}
            raise ApiError(401, says, code="invalid_api_key", type="authentication_error", headers=wants)

    async def _read(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body, well-formed where there is one; None when the client went away before its end."""
        length = headers.get(b"content-length", b"")
        declared = int(length) if length.isdigit() else 0
        if declared > self.max_body + _DISCARDED:
            raise self._too_large(close=True)
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size <= self.max_body:
                parts.append(message.get("body", b""))
            elif size > self.max_body + _DISCARDED:
                raise self._too_large(close=True)
        if size > self.max_body:
            raise self._too_large(close=False)
        body = b"".join(parts)
        if body:
            kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, f"the body's Content-Type is {kind or 'missing'!r}; send application/json")
            parse_json(body)
        return body

    def _too_large(self, *, close: bool) -> ApiError:
        message = f"the body has more than the {self.max_body} bytes that are allowed (--max-body-mb)"
        headers = {"Connection": "close"} if close else {}
        return ApiError(413, message, code="body_too_large", headers=headers)


def parse_json(body: bytes) -> Any:
    """The value of a JSON text. ApiError 400: not UTF-8, NaN or Infinity, lone surrogates, nesting without end."""
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
    return value


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
