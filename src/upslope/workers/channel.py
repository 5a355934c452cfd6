"""Numbered messages between the trainer and a worker: each arrives whole and unharmed, or as an error.

A user's code shares the worker's process and may write into any open file. So a message begins with a word that only
the two ends know and ends where its header says, with a checksum: rubbish on the way is found, never taken for an
answer. No call waits for the rest of a message unless the socket is made to block.
"""

import contextlib
import json
import selectors
import socket
import struct
import zlib
from collections.abc import Iterable
from typing import Any

TOKEN_BYTES = 16
_HEAD = struct.Struct(f"!{TOKEN_BYTES}sQQI")  # token, number of the job, bytes that follow, checksum of both
_CHUNK = 1 << 20


class Garbled(Exception):
    """Bytes arrived that the other end did not send as a message."""


class Channel:
    """One end of a socket pair. token: TOKEN_BYTES random bytes, the same at both ends."""

    def __init__(self, end: socket.socket, token: bytes) -> None:
        self._end, self._token = end, token
        self._arrived, self._unsent = bytearray(), b""

    @property
    def unread(self) -> bool:
        """Whether something arrived after the last message taken."""
        return bool(self._arrived)

    @property
    def sending(self) -> bool:
        """Whether a part of a message has not left yet."""
        return bool(self._unsent)

    def fileno(self) -> int:
        """The socket's, for selectors."""
        return self._end.fileno()

    def put(self, number: int, message: bytes) -> None:
        """Queue a message; `flush` sends it."""
        self._unsent += _HEAD.pack(self._token, number, len(message), _checksum(number, message)) + message

    def flush(self) -> None:
        """Send as much as the socket takes now. OSError: the other end is gone."""
        try:
            self._unsent = self._unsent[self._end.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self._unsent = b""
            raise

    def fill(self) -> None:
        """Read what has arrived. EOFError or OSError: nothing more will."""
        try:
            chunk = self._end.recv(_CHUNK)
        except BlockingIOError:
            return
        if not chunk:
            raise EOFError
        self._arrived += chunk

    def take(self) -> tuple[int, bytes] | None:
        """The next whole message with its number, None while there is none. Garbled: what arrived is no message."""
        if not self._token.startswith(self._arrived[:TOKEN_BYTES]):
            raise Garbled
        if len(self._arrived) < _HEAD.size:
            return None
        _, number, length, checksum = _HEAD.unpack_from(self._arrived)
        end = _HEAD.size + length
        if len(self._arrived) < end:
            return None
        message = bytes(self._arrived[_HEAD.size : end])
        if _checksum(number, message) != checksum:
            raise Garbled
        del self._arrived[:end]
        return number, message

    def send(self, number: int, answer: dict[str, Any]) -> None:
        """The worker's side: one answer, sent whole."""
        self.put(number, json.dumps(answer).encode())
        while self.sending:
            self.flush()

    def receive(self) -> tuple[int, bytes] | None:
        """The worker's side: the next job, however long it takes; None when there will be no more."""
        while (message := self.take()) is None:
            try:
                self.fill()
            except (EOFError, OSError):
                return None
        return message

    def close(self) -> None:
        """Close this process's end."""
        self._end.close()


def _checksum(number: int, message: bytes) -> int:
    return zlib.crc32(message, zlib.crc32(number.to_bytes(8, "big")))


def wait(channels: Iterable[Channel], seconds: float) -> list[Channel]:
    """Those that can be read, after `seconds` at most; what is unsent goes out meanwhile."""
    with selectors.DefaultSelector() as selector:
        for channel in channels:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.sending else 0)
            selector.register(channel, events, channel)
        ready = selector.select(max(0.0, seconds))
    for key, events in ready:
        if events & selectors.EVENT_WRITE:
            with contextlib.suppress(OSError):  # an end that is gone can be read: it says so
                key.data.flush()
    return [key.data for key, events in ready if events & selectors.EVENT_READ]
