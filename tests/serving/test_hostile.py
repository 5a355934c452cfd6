"""One client cannot take the server from the others: what is refused is refused early, and what is slow is let go."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import State
from starlette.requests import Request
from uvicorn import Config
from uvicorn.server import ServerState

from upslope.errors import one_line
from upslope.options import ServeOptions
from upslope.serving import errors as limits
from upslope.serving import server as connection
from upslope.serving.bodies import ChatBody
from upslope.serving.completions import CompletionBody
from upslope.serving.errors import ApiError, parse_json
from upslope.serving.page import Thumb
from upslope.serving.routes import EmbeddingBody
from upslope.serving.server import Connection, LogLines
from upslope.serving.service import QueueFull, Service

MANY = 100_000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, {"prompt": [-1] * MANY}),
        (CompletionBody, {"prompt": [1.5] * MANY}),
        (CompletionBody, {"prompt": ["a"] + [1] * MANY}),
        (CompletionBody, {"prompt": [[-1] * MANY] * 2}),
        (CompletionBody, {"prompt": "a", **{f"k{i}": 1 for i in range(MANY)}}),
        (CompletionBody, {"prompt": "a", "logit_bias": {f"k{i}": 1 for i in range(MANY)}}),
        (EmbeddingBody, {"input": [None] * MANY}),
        (ChatBody, {"messages": [{}] * 2000}),
        (ChatBody, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        (Thumb, {"messages": [{}] * MANY, "id": "a", "reply": "a", "label": True, "model": "m"}),
        (Thumb, {f"k{i}": 1 for i in range(MANY)}),
    ],
)
def test_a_body_full_of_errors_has_few(kind: Any, body: Any) -> None:
    """Every error is an object that is made on the event loop: a hundred thousand took seconds."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(body)
    assert caught.value.error_count() < 10


def test_what_is_too_much_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.json, "loads", lambda *a, **k: pytest.fail("it was parsed"))
    for body in (b"[" + b"[]," * 30_000 + b"1]", b"[" + b"{}," * 30_000 + b"1]", b"[" + b"1," * 600_000 + b"1]"):
        with pytest.raises(ApiError, match="are allowed") as caught:
            parse_json(body)
        assert caught.value.status == 400


def test_texts_may_hold_as_many_brackets_as_they_like() -> None:
    text = r"\\ \" [1, {2}], " * 60_000
    assert parse_json(json.dumps({"prompt": text}).encode()) == {"prompt": text}
    deep: Any = 1
    for depth in range(101):
        if depth == 100:
            assert parse_json(json.dumps(deep).encode())
        deep = [deep]
    with pytest.raises(ApiError, match="nested too deeply"):
        parse_json(json.dumps(deep).encode())


def test_a_body_has_a_time_in_which_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.1)
    guard = limits.Guard(lambda *_: pytest.fail("it was handed on"), State({"settings": ServeOptions()}))
    scope = {"type": "http", "path": "/v1/completions", "headers": [(b"content-type", b"application/json")]}

    async def dripping() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    with pytest.raises(ApiError, match="did not come within") as caught:
        asyncio.run(guard.read(Request(scope, dripping)))
    assert (caught.value.status, caught.value.headers) == (408, {"Connection": "close"})


def test_only_so_many_bytes_are_read_at_a_time(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_HELD", 1000)
    for _ in range(2):
        answer = client.post("/v1/completions", json={"prompt": "x" * 2000})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_routes_that_no_context_bounds_take_less(client: TestClient) -> None:
    for route, size in limits.SMALLER.items():
        assert client.post(route, json={"prompt": "x" * size}).status_code == 413, route


def test_the_loop_goes_on_beside_slow_work_and_what_waits_is_bounded(service: Service) -> None:
    service.max_queue = 3

    async def main() -> None:
        loop = asyncio.get_running_loop()
        slow = [asyncio.ensure_future(service.aside(time.sleep, 0.3, size=10**6)) for _ in range(3)]
        began = loop.time()
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="3 requests wait to be read"):
            await service.aside(time.sleep, 0, size=10**4)
        service.max_queue = 4
        await service.aside(time.sleep, 0, size=10**4)
        assert loop.time() - began < 0.25, "a small job does not wait for large ones"
        await asyncio.gather(*slow)
        assert loop.time() - began > 0.85, "large ones are done one after the other"

    asyncio.run(main())


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What comes back on each of several connections to which pieces are sent, each `pause` seconds apart."""
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.3)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def one(port: int, pieces: list[bytes], pause: float) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answer = asyncio.ensure_future(asyncio.wait_for(reader.read(), 20))
        for piece in pieces:
            if not answer.done():
                writer.write(piece)
                await asyncio.sleep(pause)
        return await answer

    async def main(pieces: list[bytes], pause: float, times: int) -> list[bytes]:
        config, state = Config(app, log_config=None, timeout_keep_alive=1), ServerState()
        server = await asyncio.get_running_loop().create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await asyncio.gather(*(one(port, pieces, pause) for _ in range(times)))

    return lambda pieces, pause=0.0, times=1: asyncio.run(main(pieces, pause, times))


def test_headers_that_drip_end_the_connection(talk: Any) -> None:
    for pieces in ([], [b"GET / HT"], [b"GET / HTTP/1.1\r\n", *[b"a: b\r\n"] * 8]):
        (answer,) = talk(pieces, pause=0.1)
        assert answer.startswith(b"HTTP/1.1 408"), pieces
        assert b"x-content-type-options: nosniff" in answer
    whole = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    (answer,) = talk([whole, b"GET /", b" HT"], pause=0.2)
    assert answer.startswith(b"HTTP/1.1 200"), "a request was answered before"
    assert b"HTTP/1.1 408" in answer


def test_only_so_many_connections(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 4)
    answers = talk([], times=6)
    assert sum(answer.startswith(b"HTTP/1.1 408") for answer in answers) == 4
    assert sum(answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer for answer in answers) == 2


def test_headers_without_end_and_no_http(talk: Any) -> None:
    (answer,) = talk([b"GET / HTTP/1.1\r\na: " + b"b" * 700_000])
    assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    (answer,) = talk([b"\x16\x03\x01 no HTTP\r\n\r\n"])
    assert b"no HTTP request that can be read" in answer


def test_every_answer_forbids_sniffing_and_storing(app: FastAPI, client: TestClient) -> None:
    ask = {"prompt": "a", "max_tokens": 1}
    answers = [client.get(path) for path in ("/health", "/metrics", "/v1/models", "/no/route", "/openapi.json")]
    answers += [client.post("/v1/completions", json=body) for body in (ask, {**ask, "stream": True}, {"n": 0})]
    answers.append(client.get("/health", headers={"Host": "evil.example"}))
    answers.append(client.post("/v1/completions", content=b"{", headers={"Content-Type": "text/plain"}))
    for answer in answers:
        assert answer.headers["X-Content-Type-Options"] == "nosniff", answer.url
        assert answer.headers["Cache-Control"] == "no-store", answer.url
    assert client.get("/").headers["Cache-Control"] == "no-cache", "the page's files have a tag to be asked by"


def test_a_line_is_one_line_and_keeps_its_end() -> None:
    line = one_line("begin\n\x1b[31m\u2028" + "x" * 10_000 + " remedy", 300)
    assert len(line) <= 300
    assert line.startswith(r"begin \x1b[31m")
    assert line.endswith("x remedy")
    assert "…" in line
    assert one_line("é and ✓ stay") == "é and ✓ stay"


def test_log_lines_cannot_be_forged_or_without_number(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = logging.getLogger("upslope.test_hostile")
    lines = LogLines(lambda: now[0])
    log.addFilter(lines)
    log.error("a %s", "b\nERROR: forged" + "x" * 9000)
    for _ in range(38):
        log.warning("Invalid HTTP request received.")
    now[0] = 61.0
    log.warning("Invalid HTTP request received.")
    try:
        raise ValueError("b\nERROR: forged")
    except ValueError:
        log.exception("failed")
    log.removeFilter(lines)
    first, second, third, fourth = caplog.records
    assert first.getMessage().startswith("a b ERROR: forged")
    assert len(first.getMessage()) <= 500
    assert second.getMessage() == "Invalid HTTP request received."
    assert third.getMessage().endswith("(37 further malformed requests since the last such line)")
    assert "\nERROR" not in logging.Formatter().format(fourth)
