"""Clients of a server on loopback, each asking one streamed completion after another. A process of its own.

    python -m benchmarks.serving.client SETTINGS.json RESULT.json

Only the standard library is imported, and HTTP is spoken by hand: the clients share the processors with the server, and
a client library costs more per chunk than reading it. Settings: port, clients, limit_s, requests (bodies for
/v1/completions with `max_tokens`; client i sends those at i, i + clients, ...). Result: see `load`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"


class Refused(RuntimeError):
    """The server answered with an error, or not with all that was asked for."""


async def ask(port: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """One streamed completion: its token counts by the server's `usage`, and seconds from before the connection.

    first_s and last_s: when the first and the last text came; gaps_s: between neighbouring texts (a text may hold
    several tokens). Refused for an HTTP or streamed error, and for other than body["max_tokens"] tokens.
    """
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        payload = json.dumps(body).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n" % (HOST.encode(), port, len(payload)) + payload
        )
        times, usage = await _read(reader, began)
    finally:
        writer.close()
    if not times:
        raise Refused("no text came")
    if usage is None:
        raise Refused("the stream ended without usage")
    if usage["completion_tokens"] != body["max_tokens"]:
        raise Refused(f"{usage['completion_tokens']} tokens came where max_tokens = {body['max_tokens']}")
    return {
        "first_s": times[0],
        "last_s": times[-1],
        "gaps_s": [after - before for before, after in itertools.pairwise(times)],
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
    }


async def _read(reader: asyncio.StreamReader, began: float) -> tuple[list[float], dict[str, int] | None]:
    """Seconds at which text came, and the usage."""
    status = int((await reader.readline()).split()[1])
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip().lower()
    if status != 200:
        raise Refused(f"status {status}: {(await reader.read())[:500].decode(errors='replace')}")
    times, usage = [], None
    async for event in _events(_body(reader, chunked=headers.get(b"transfer-encoding") == b"chunked")):
        if "error" in event:
            raise Refused(f"error in the stream: {event['error']}")
        if any(choice["text"] for choice in event["choices"]):
            times.append(time.perf_counter() - began)
        usage = event.get("usage") or usage
    return times, usage


async def _body(reader: asyncio.StreamReader, *, chunked: bool) -> AsyncIterator[bytes]:
    """The pieces of a response's body; Refused when it ends early."""
    if not chunked:
        while piece := await reader.read(65536):
            yield piece
        return
    try:
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    except asyncio.IncompleteReadError as error:
        raise Refused("the connection was closed in the middle of the stream") from error


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of an event stream, without its end mark (which not every server sends)."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip()
            if data and data != b"[DONE]":
                yield json.loads(data)


async def load(port: int, bodies: Sequence[Mapping[str, Any]], clients: int, limit_s: float) -> dict[str, Any]:
    """A closed loop: each client sends its next request when the one before has ended, all start at once.

    Result: seconds from the first request to the last answer, `answers` in the order of `bodies`, `errors` in words.
    """
    answers: list[dict[str, Any] | None] = [None] * len(bodies)
    errors: list[str] = []

    async def client(first: int) -> None:
        for place in range(first, len(bodies), clients):
            try:
                answers[place] = await ask(port, bodies[place])
            except (Refused, OSError, ValueError, IndexError, KeyError) as error:
                errors.append(f"request {place}: {type(error).__name__}: {error}")

    began = time.perf_counter()
    try:
        async with asyncio.timeout(limit_s):
            await asyncio.gather(*(client(first) for first in range(clients)))
    except TimeoutError:
        errors.append(f"not finished after {limit_s:.0f} s")
    return {"seconds": time.perf_counter() - began, "answers": answers, "errors": errors}


def main() -> None:
    """Read the settings, make the load, write the result."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    result = asyncio.run(load(asked["port"], asked["requests"], asked["clients"], asked["limit_s"]))
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
