"""Streamed chat: the chunks add up to the whole answer, in the order and form that clients rely on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from upslope.options import ServeOptions
from upslope.serving.server import create_app

from .conftest import NAME, Live, make_service
from .scripted import script
from .test_chat import ASK, CALL, CITY, NOW, URL, WEATHER, ask, hermes, hermes_folder, schema_format, service_of

__all__ = ["hermes", "hermes_folder"]


def stream(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    """The chunks of an answer; each is one event, the last event is [DONE]."""
    response = client.post(URL, json={"messages": ASK, "max_tokens": 8, "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def choices(chunks: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    return [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in choices(chunks, index))


def check_form(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """The role first, the reason last and only there; returns it."""
    mine = choices(chunks, index)
    assert mine[0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in choice["delta"] for choice in mine[1:])
    assert all(choice["finish_reason"] is None for choice in mine[:-1])
    assert mine[-1]["delta"] == {}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["system_fingerprint"] for chunk in chunks} == {f"{NAME}@0"}
    return mine[-1]["finish_reason"]


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 60},
        {"n": 3, "max_tokens": 20},
        {"temperature": 0, "stop": ["\n\n\n"]},
        {"logprobs": True, "top_logprobs": 2, "n": 2, "max_tokens": 30},
        {"response_format": schema_format(CITY), "max_tokens": 40},
        {"use_beam_search": True, "n": 2, "max_tokens": 5},
        {"return_token_ids": True, "max_tokens": 20},
        {"return_token_ids": True, "use_beam_search": True, "best_of": 2, "n": 2},
    ],
)
def test_the_chunks_add_up(client: TestClient, body: dict[str, Any]) -> None:
    """Text, log-probs, tokens, reasons and counts are those of the answer that is not streamed."""
    whole = ask(client, seed=4, **body)
    chunks = stream(client, seed=4, stream_options={"include_usage": True}, **body)
    for choice in whole["choices"]:
        index = choice["index"]
        assert check_form(chunks, index) == choice["finish_reason"]
        assert text_of(chunks, index) == choice["message"]["content"]
        if body.get("logprobs"):
            parts = [c["logprobs"]["content"] for c in choices(chunks, index) if c["logprobs"]]
            assert [entry for part in parts for entry in part] == choice["logprobs"]["content"]
        if body.get("return_token_ids"):
            parts = [c.get("token_ids", []) for c in choices(chunks, index)]
            assert [token for part in parts for token in part] == choice["token_ids"]
            assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_no_counts_unless_asked(client: TestClient) -> None:
    for options in ({}, {"stream_options": {"include_usage": False}}):
        chunks = stream(client, **options)
        assert all(chunk["choices"] for chunk in chunks)
        assert all("usage" not in chunk for chunk in chunks)


def test_every_chunk_is_text(app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte per token: a character comes when it is whole, one at a time."""
    script(monkeypatch, service_of(app), "é漢🙂!")
    chunks = stream(client, max_tokens=30, logprobs=True)
    deltas = [choice["delta"]["content"] for choice in choices(chunks) if choice["delta"].get("content")]
    assert deltas == ["é", "漢", "🙂", "!"]
    sizes = [len(choice["logprobs"]["content"]) for choice in choices(chunks) if choice["logprobs"]]
    assert sum(sizes) == 2 + 3 + 4 + 1 + 1


def test_stop_text_is_held_back(app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, service_of(app), "so END- said he: END.")
    chunks = stream(client, max_tokens=40, stop="END.")
    assert check_form(chunks) == "stop"
    assert text_of(chunks) == "so END- said he: "
    assert not any("END." in (choice["delta"].get("content") or "") for choice in choices(chunks))


def test_calls_are_streamed(hermes: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a call is shown as text; each call is one delta with its place, its id and its whole arguments."""
    script(monkeypatch, hermes.app.state.services[NAME], f"Look: <tool\n{CALL}\n{CALL}")
    chunks = stream(hermes, tools=[WEATHER], max_tokens=None)
    assert check_form(chunks) == "tool_calls"
    assert text_of(chunks) == "Look: <tool"
    calls = [call for choice in choices(chunks) for call in choice["delta"].get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert [call["function"] for call in calls] == [{"name": "weather", "arguments": '{"city": "Rome"}'}] * 2
    assert len({call["id"] for call in calls}) == 2


def test_a_forced_call_is_streamed(hermes: TestClient) -> None:
    once = {"tool_choice": "required", "parallel_tool_calls": False}
    chunks = stream(hermes, tools=[WEATHER, NOW], max_tokens=200, n=2, **once)
    for index in (0, 1):
        assert check_form(chunks, index) == "tool_calls"
        assert text_of(chunks, index) == ""
        (call,) = [call for choice in choices(chunks, index) for call in choice["delta"].get("tool_calls", [])]
        assert call["function"]["name"] in ("weather", "now")


def test_an_error_on_the_way(app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the stream as an event in OpenAI's shape; the server goes on."""
    service = service_of(app)
    submit = service.submit

    async def fails(prompt: Any, params: Any, *, token_mask: Any, **options: Any) -> Any:
        def mask(prompt: list[int], generated: list[int]) -> list[int]:
            return [70] if len(generated) < 3 else []

        return await submit(prompt, params, token_mask=mask, **options)

    monkeypatch.setattr(service, "submit", fails)
    chunks = stream(client)
    assert len(text_of(chunks[:-1])) == 3
    assert "allows no token" in chunks[-1]["error"]["message"]
    monkeypatch.undo()
    assert check_form(stream(client)) in ("stop", "length")


def test_what_is_refused_is_refused_at_once(client: TestClient) -> None:
    """A body that cannot be honoured gives a status, not a stream."""
    response = client.post(URL, json={"messages": ASK, "stream": True, "max_tokens": 10_000})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"


def lines(response: httpx.Response) -> Iterator[str]:
    return (line for line in response.iter_lines() if line)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away(hermes_folder: Path, serve: Callable[[FastAPI], Live], streamed: bool) -> None:
    """Its slot is free again long before its answer would have ended."""
    service = make_service(hermes_folder)
    url = serve(create_app({NAME: service}, ServeOptions())).url
    body = {"messages": ASK, "ignore_eos": True, "n": 4, "stream": streamed}
    with httpx.Client(base_url=url) as client:
        if streamed:
            with client.stream("POST", URL, json=body) as response:
                assert "assistant" in next(lines(response))
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(URL, json=body, timeout=httpx.Timeout(10, read=0.1))
    with httpx.Client(base_url=url) as client:
        while service.waiting or service.running:
            assert client.post(URL, json={"messages": ASK, "max_tokens": 1}).status_code == 200
    assert service.engine.stats.generated_tokens < 4 * service.max_positions / 2
