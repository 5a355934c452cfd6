"""One client's connection: how long it may be silent, how many there may be, and what is logged of them."""

import asyncio
import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from upslope.errors import one_line
from upslope.serving.errors import ALWAYS, ApiError, answer

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
        headers = [*response.raw_headers, *ALWAYS, (b"connection", b"close")]
        head = b"".join(b"%b: %b\r\n" % pair for pair in headers)
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
