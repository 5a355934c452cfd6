"""The official `openai` client, unchanged, against a server on loopback: all it offers that we say we have."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from upslope.options import ServeOptions
from upslope.serving.server import create_app
from upslope.serving.service import Service

from .conftest import NAME, Live, make_service
from .scripted import script
from .test_chat import CALL, NOW, WEATHER, hermes_folder

openai = pytest.importorskip("openai")

__all__ = ["hermes_folder"]
KEY = "a-key"
ASK: Any = [{"role": "user", "content": "Say something."}]


class Trip(BaseModel):
    """What a reply must be."""

    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]
    by_train: bool


@pytest.fixture
def service(hermes_folder: Path) -> Service:
    return make_service(hermes_folder)


@pytest.fixture
def live(service: Service, serve: Callable[[FastAPI], Live]) -> Live:
    return serve(create_app({NAME: service}, ServeOptions(api_key=KEY, max_body_mb=0.5)))


@pytest.fixture
def client(live: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).object == "model"


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(model=NAME, messages=ASK, max_tokens=6, n=2, seed=1, temperature=0.7)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.message.role == "assistant" and choice.message.content for choice in answer.choices)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint == f"{NAME}@0"
    raw = client.chat.completions.with_raw_response.create(model=NAME, messages=ASK, max_tokens=1)
    assert raw.headers["x-weight-version"] == "0"


def test_chat_streamed(client: Any) -> None:
    """The chunks add up to the answer that is not streamed; the counts come last."""
    asked = {"model": NAME, "messages": ASK, "max_completion_tokens": 20, "seed": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_the_clients_own_accumulator(client: Any, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """`chat.completions.stream` puts the chunks together by its own rules, log-probs included."""
    script(monkeypatch, service, "né 漢!")
    asked = {"model": NAME, "messages": ASK, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "né 漢!"
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].logprobs.content == whole.choices[0].logprobs.content


def test_logprobs(client: Any) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=ASK, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    for entry in answer.choices[0].logprobs.content:
        top = [alternative.logprob for alternative in entry.top_logprobs]
        assert top == sorted(top, reverse=True)
        assert entry.logprob == top[0] < 0
        assert sum(map(math.exp, top)) < 1


def test_tools(client: Any, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call, its result sent back with the client's own message object, the last answer."""
    script(monkeypatch, service, CALL, "It is sunny.")
    first = client.chat.completions.create(model=NAME, messages=ASK, tools=[WEATHER, NOW])
    assert first.choices[0].finish_reason == "tool_calls"
    (call,) = first.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    last = client.chat.completions.create(
        model=NAME, messages=[*ASK, first.choices[0].message, result], tools=[WEATHER]
    )
    assert last.choices[0].message.content == "It is sunny."
    assert last.choices[0].finish_reason == "stop"


def test_tools_streamed(client: Any, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, service, f"Let me see.\n{CALL}\n{CALL}")
    with client.chat.completions.stream(model=NAME, messages=ASK, tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.content == "Let me see."
    assert [call.function.arguments for call in message.tool_calls] == ['{"city": "Rome"}'] * 2


def test_parse(client: Any) -> None:
    """A pydantic model as response_format: what a model that knows nothing says is one of its instances."""
    answer = client.chat.completions.parse(model=NAME, messages=ASK, response_format=Trip, n=8, seed=0)
    trips = [choice.message.parsed for choice in answer.choices]
    assert all(isinstance(trip, Trip) for trip in trips)
    assert len({trip.model_dump_json() for trip in trips}) > 1


def test_parse_of_a_cut_reply(client: Any) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=NAME, messages=ASK, response_format=Trip, max_tokens=5)


def test_parse_of_a_call(client: Any) -> None:
    """The client's strict function tool, its arguments parsed into the model."""
    tool = openai.pydantic_function_tool(Trip, name="plan")
    answer = client.chat.completions.parse(model=NAME, messages=ASK, tools=[tool], tool_choice="required", seed=0)
    (call, *_) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Trip)


def test_completions(client: Any) -> None:
    answer = client.completions.create(model=NAME, prompt="abc", max_tokens=4, echo=True, logprobs=1, temperature=0)
    choice = answer.choices[0]
    assert choice.text.startswith("abc")
    assert choice.logprobs.tokens[:3] == ["a", "b", "c"]
    assert choice.logprobs.token_logprobs[0] is None
    chunks = list(client.completions.create(model=NAME, prompt="abc", max_tokens=4, temperature=0, stream=True))
    assert "abc" + "".join(chunk.choices[0].text for chunk in chunks) == choice.text


def test_embeddings(client: Any) -> None:
    """The client asks for base64 by itself and decodes it."""
    answer = client.embeddings.create(model=NAME, input=["one", "two"])
    vectors = np.array([row.embedding for row in answer.data])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-6)
    floats = client.embeddings.create(model=NAME, input="two", encoding_format="float").data[0].embedding
    assert vectors[1] == pytest.approx(floats, abs=1e-7)
    assert len(client.embeddings.create(model=NAME, input=[5, 6], dimensions=3).data[0].embedding) == 3


def test_errors_by_class(client: Any) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as refused:
        create(model=NAME, messages=ASK, temperature=-1)
    assert (refused.value.param, refused.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        create(model=NAME, messages=ASK, reasoning_effort="low")
    with pytest.raises(openai.BadRequestError) as refused:
        create(model=NAME, messages=ASK, max_tokens=100_000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="gpt-7"):
        create(model="gpt-7", messages=ASK)
    with pytest.raises(openai.APIStatusError) as large:
        create(model=NAME, messages=[{"role": "user", "content": "x" * 2**20}])
    assert large.value.status_code == 413
    stranger = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_full_queue(hermes_folder: Path, serve: Callable[[FastAPI], Live]) -> None:
    """RateLimitError; with retries, which wait as Retry-After says, the client gets its answer."""
    service = make_service(hermes_folder, max_queue=1, max_batch=1)
    url = serve(create_app({NAME: service}, ServeOptions())).url

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            asked = {"model": NAME, "messages": ASK, "seed": 0}
            long = {**asked, "stream": True, "extra_body": {"ignore_eos": True}}
            running = await client.chat.completions.create(**long)
            await anext(aiter(running))
            waiting = asyncio.create_task(client.chat.completions.create(**asked, max_tokens=1))
            while not service.waiting:
                await asyncio.sleep(0)
            with pytest.raises(openai.RateLimitError) as full:
                await client.chat.completions.create(**asked, max_tokens=1)
            assert full.value.response.headers["retry-after"]
            patient = asyncio.create_task(
                client.with_options(max_retries=5).chat.completions.create(**asked, max_tokens=1)
            )
            await running.close()
            assert (await waiting).choices
            assert (await patient).choices

    asyncio.run(run())


def test_async(live: Live) -> None:
    """Streams and whole answers side by side from one client."""

    async def run() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as client:

            async def whole(seed: int) -> str:
                answer = await client.chat.completions.create(model=NAME, messages=ASK, max_tokens=16, seed=seed)
                return answer.choices[0].message.content or ""

            async def streamed(seed: int) -> str:
                asked = {"model": NAME, "messages": ASK, "max_tokens": 16, "seed": seed}
                chunks = await client.chat.completions.create(**asked, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            results = await asyncio.gather(*(one(seed) for one in (whole, streamed) for seed in range(6)))
            return results[:6], results[6:]

    complete, pieces = asyncio.run(run())
    assert complete == pieces
    assert len(set(complete)) == 6


def test_vllms_fields(client: Any) -> None:
    """Extra fields as clients of vLLM send them."""
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "return_token_ids": True}
    answer = client.chat.completions.create(model=NAME, messages=ASK, max_tokens=4, extra_body=extra)
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens
