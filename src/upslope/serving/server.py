"""The application on a port, until a signal: the first one drains, the second one stops at once."""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from upslope.errors import RunError
from upslope.options import ServeOptions
from upslope.serving.connection import Connection, LogLines

KEEP_ALIVE_SECONDS = 75
CLOSING_SECONDS = 5
INTERRUPTED = 130


def bind(host: str, port: int) -> socket.socket:
    """A socket that will listen there; RunError where that cannot be. Nobody can connect before `serve`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
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
        self._draining: asyncio.Task[None] | None = None

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
        self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            services = self._app.state.services.values()
            await asyncio.gather(*(service.stop(self._drain_seconds) for service in services))
        finally:
            self.should_exit = True
