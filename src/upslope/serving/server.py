"""The application: routes, limits and errors around the services that do the work; on a port, until a signal.

The first signal drains, the second one stops at once. A connection has limits of its own: how long it may be silent,
how many there may be, and what is logged of them.
"""

import asyncio
import logging
import socket
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from upslope.errors import RunError, one_line
from upslope.options import ServeOptions
from upslope.serving import chat, completions, errors, page, routes
from upslope.serving.errors import ALWAYS, ApiError, Guard, answer
from upslope.serving.routes import Metrics
from upslope.serving.service import Service
from upslope.version import __version__

KEEP_ALIVE_SECONDS = 75
CLOSING_SECONDS = 5
INTERRUPTED = 130


def bind(host: str, port: int) -> socket.socket:
    """A socket that will listen there; RunError where that cannot be. Nobody can connect before `serve`."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise RunError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from error
    return made


def url_of(bound: socket.socket) -> str:
    """Where a bound socket is to be found."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, bound: socket.socket, settings: ServeOptions, on_ready: Callable[[str], None]) -> int:
    """Answer requests until a signal; `on_ready` is called with the URL when they can come. Returns the exit code.

    On SIGTERM or Ctrl-C new requests are answered 503, running ones have settings.drain_seconds to finish, and the code
    is 0. A second signal stops at once: 130.
    """
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    for name in ("uvicorn.error", "upslope.serving"):
        logging.getLogger(name).addFilter(LogLines())
    server = _Server(config, app, settings.drain_seconds, lambda: on_ready(url_of(bound)))
    server.run(sockets=[bound])
    for service in app.state.services.values():
        service.end()
    return INTERRUPTED if server.force_exit else 0


class _Server(uvicorn.Server):
    """uvicorn's server, with draining in place of its own way to end."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._drain_seconds, self._ready = app, drain_seconds, ready
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Called by the interpreter between any two instructions of the main thread."""
        state = self._app.state
        if state.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        state.draining = True
        self._draining = asyncio.run_coroutine_threadsafe(self._drain(), self._loop)

    async def _drain(self) -> None:
        try:
            await asyncio.gather(*(each.stop(self._drain_seconds) for each in self._app.state.services.values()))
        finally:
            self.should_exit = True


HEADER_SECONDS = 15.0
"""From the opening of a connection, or the first byte of a further request, to the end of the headers."""
MAX_CONNECTIONS = 900
"""Fewer than the files that a process may usually open; those beyond are answered 503."""
MAX_HEADERS = 2**19
_MALFORMED = ("Invalid HTTP", "Unsupported upgrade", "No supported WebSocket")


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with limits for those who hold connections open and send nothing whole."""

    _timer: asyncio.TimerHandle | None = None
    _length = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            return self._refuse(ApiError(503, "too many connections are open; try again later", code="busy"))
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._timer is not None:  # headers are still coming
            self._length += len(data)
            if self._length > MAX_HEADERS:
                return self._refuse(ApiError(431, f"the headers have more than {MAX_HEADERS} bytes"))
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:
            self._wait()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is no HTTP request that can be read"))

    def _wait(self) -> None:
        self._length = 0
        self._timer = self.loop.call_later(HEADER_SECONDS, self._late)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            return self._wait()  # an answer is under way; the next request was sent before its end
        self._refuse(ApiError(408, f"no whole request came within {HEADER_SECONDS:g} s"))

    def _refuse(self, error: ApiError) -> None:
        self._stop_waiting()
        response = answer(error)
        head = b"".join(b"%b: %b\r\n" % pair for pair in [*response.raw_headers, *ALWAYS, (b"connection", b"close")])
        self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + response.body)
        self.transport.close()


class LogLines(logging.Filter):
    """Makes a record one line of bounded length, which nothing that was sent can break or forge.

    Of requests that are no HTTP one line a minute is logged, and how many more there were.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._said, self._unsaid = clock, float("-inf"), 0

    def filter(self, record: logging.LogRecord) -> bool:
        line = one_line(record.getMessage(), 500)
        if line.startswith(_MALFORMED):
            now = self._clock()
            if now - self._said < 60:
                self._unsaid += 1
                return False
            if self._unsaid:
                line += f" ({self._unsaid} further malformed requests since the last such line)"
            self._said, self._unsaid = now, 0
        if record.exc_info:
            lines = "".join(traceback.format_exception(*record.exc_info)).splitlines()[-40:]
            record.exc_text = "\n".join(f"  | {one_line(text, 300)}" for text in lines)
        record.msg, record.args = line, ()
        return True


def create_app(services: Mapping[str, Service], settings: ServeOptions) -> FastAPI:
    """An ASGI application over `services`, which start and stop with it.

    Interactive documentation is left out, because its page loads scripts from elsewhere; /openapi.json is there.
    `app.state`: services, settings, metrics, and `draining`, which turns new requests away while it is True.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for service in services.values():
            service.start()
        yield
        for service in services.values():
            await service.stop()

    app = FastAPI(
        title="upslope",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"description": "refused; error.message says why"}, "5XX": {"description": "failed"}},
    )
    app.state.services = dict(services)
    app.state.settings = settings
    app.state.metrics = Metrics(services)
    app.state.draining = False
    errors.install(app)
    for room in (routes, completions, chat, page):
        app.include_router(room.router)
    app.add_middleware(Guard, state=app.state)
    return app
