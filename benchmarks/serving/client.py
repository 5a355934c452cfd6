"""Clients of a server on loopback, each asking one streamed completion after another. A process of its own.

    python -m benchmarks.serving.client SETTINGS.json RESULT.json

The clients share the processors with the server, so they cost as little as can be: while the load runs they only note
when which bytes came, and what these say is read afterwards. Settings: port, clients, limit_s, requests (bodies for
/v1/completions with `max_tokens`; client i sends those at i, i + clients, ...). Result: see `load`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"


class Refused(RuntimeError):
    """The server answered with an error, or not with all that was asked for."""


@dataclass
class Recording:
    """An answer as it came: when the request began, and the blocks of bytes, each with its time."""

    began: float
    blocks: list[tuple[float, bytes]]


class _Recorder(asyncio.Protocol):
    """Keeps what comes until the connection ends."""

    def __init__(self, request: bytes, recording: Recording) -> None:
        self._request, self._recording = request, recording
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._recording.blocks.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def record(port: int, body: Mapping[str, Any]) -> Recording:
    """Ask for a completion and keep the bytes of the answer; nothing is read from them here."""
    recording = Recording(time.perf_counter(), [])
    payload = json.dumps(body).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % (HOST.encode(), port, len(payload)) + payload
    )
    loop = asyncio.get_running_loop()
    transport, recorder = await loop.create_connection(lambda: _Recorder(request, recording), HOST, port)
    try:
        await recorder.ended
    finally:
        transport.abort()
    return recording


def read(recording: Recording, max_tokens: int) -> dict[str, Any]:
    """A recorded answer's token counts by the server's `usage`, and seconds from before the connection.

    first_s and last_s: when the first and the last text came; gaps_s: between neighbouring texts (a text may hold
    several tokens). Refused for an HTTP or streamed error, for other than max_tokens tokens, and for half an answer.
    """
    times, usage = [], None
    for moment, event in _events(_body(recording.blocks)):
        if "error" in event:
            raise Refused(f"error in the stream: {event['error']}")
        if any(choice["text"] for choice in event["choices"]):
            times.append(moment - recording.began)
        usage = event.get("usage") or usage
    if not times:
        raise Refused("no text came")
    if usage is None:
        raise Refused("the stream ended without usage")
    if usage["completion_tokens"] != max_tokens:
        raise Refused(f"{usage['completion_tokens']} tokens came where max_tokens = {max_tokens}")
    return {
        "first_s": times[0],
        "last_s": times[-1],
        "gaps_s": [after - before for before, after in itertools.pairwise(times)],
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
    }


def _body(blocks: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The pieces of a response's body, each with the time at which its last byte came; Refused when it ends early."""
    rest = iter(blocks)
    moment, data = 0.0, b""
    while b"\r\n\r\n" not in data:
        moment, more = next(rest, (moment, b""))
        if not more:
            raise Refused(f"no answer: {data[:200]!r}")
        data += more
    head, _, data = data.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    after = itertools.chain([(moment, data)], rest)
    if int(status.split()[1]) != 200:
        says = b"".join(data for _, data in after)[:500].decode(errors="replace")
        raise Refused(f"status {int(status.split()[1])}: {says}")
    headers = {name.strip().lower(): value.strip().lower() for name, _, value in (s.partition(b":") for s in lines)}
    yield from _chunks(after) if headers.get(b"transfer-encoding") == b"chunked" else after


def _chunks(blocks: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """What chunked transfer coding (RFC 9112, section 7.1) wraps."""
    held = b""
    for moment, data in blocks:
        held += data
        while b"\r\n" in held:
            size, _, rest = held.partition(b"\r\n")
            wanted = int(size.partition(b";")[0], 16)
            if not wanted:
                return
            if len(rest) < wanted + 2:
                break
            yield moment, rest[:wanted]
            held = rest[wanted + 2 :]
    raise Refused("the connection was closed in the middle of the stream")


def _events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The JSON objects of an event stream, without its end mark (which not every server sends)."""
    rest = b""
    for moment, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip()
            if data and data != b"[DONE]":
                yield moment, json.loads(data)


async def load(port: int, bodies: Sequence[Mapping[str, Any]], clients: int, limit_s: float) -> dict[str, Any]:
    """A closed loop: each client sends its next request when the one before has ended, all start at once.

    Result: seconds from the first request to the last answer, `answers` in the order of `bodies`, `errors` in words.
    """
    recordings: list[Recording | None] = [None] * len(bodies)
    answers: list[dict[str, Any] | None] = [None] * len(bodies)
    errors: list[str] = []

    async def client(first: int) -> None:
        for place in range(first, len(bodies), clients):
            try:
                recordings[place] = await record(port, bodies[place])
            except OSError as error:
                errors.append(f"request {place}: {type(error).__name__}: {error}")

    began = time.perf_counter()
    try:
        async with asyncio.timeout(limit_s):
            await asyncio.gather(*(client(first) for first in range(clients)))
    except TimeoutError:
        errors.append(f"not finished after {limit_s:.0f} s")
    seconds = time.perf_counter() - began
    for place, recording in enumerate(recordings):
        try:
            answers[place] = recording and read(recording, bodies[place]["max_tokens"])
        except (Refused, ValueError, IndexError, KeyError) as error:
            errors.append(f"request {place}: {type(error).__name__}: {error}")
    return {"seconds": seconds, "answers": answers, "errors": errors}


def main() -> None:
    """Read the settings, make the load, write the result."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    result = asyncio.run(load(asked["port"], asked["requests"], asked["clients"], asked["limit_s"]))
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
