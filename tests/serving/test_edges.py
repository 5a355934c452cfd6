"""At the very edge of a limit, with the smallest seed, over several prompts at once, and while the weights change."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from upslope.engine import Event
from upslope.options import ServeOptions
from upslope.serving.engine_thread import Stream
from upslope.serving.server import create_app
from upslope.types import Completion, SamplingParams

from .conftest import NAME, make_service

PATH, CHAT = "/v1/completions", "/v1/chat/completions"
ASK = [{"role": "user", "content": "Say something."}]


def answered(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    lines = client.post(PATH, json={**body, "stream": True}).text.split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line not in ("", "data: [DONE]")]


def test_zero_is_a_seed(client: TestClient) -> None:
    """The same text again, and another one than seed 1 gives."""
    for path, asked in ((PATH, {"prompt": "abc"}), (CHAT, {"messages": ASK})):
        found = [answered(client, path, **asked, max_tokens=12, ignore_eos=True, seed=seed) for seed in (0, 0, 1)]
        first, again, other = ([c.get("text", c.get("message")) for c in one["choices"]] for one in found)
        assert first == again != other, path


def test_a_body_may_be_as_large_as_is_said_and_no_larger(model_folder: Path) -> None:
    app = create_app({NAME: make_service(model_folder)}, ServeOptions(max_body_mb=1024 / 2**20))
    body = json.dumps({"prompt": "abc", "max_tokens": 1}).encode()
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for size, status in ((1024, 200), (1025, 413)):
            content = body + b" " * (size - len(body))
            answer = client.post(PATH, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == status, size


def test_as_many_prompts_as_there_is_room_for(model_folder: Path) -> None:
    """Four can wait and two can run: six prompts in one request are taken, seven are not."""
    app = create_app({NAME: make_service(model_folder, max_batch=2, max_queue=4)}, ServeOptions())
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for count, status in ((6, 200), (7, 400)):
            assert client.post(PATH, json={"prompt": ["a"] * count, "max_tokens": 1}).status_code == status, count


def test_each_of_several_stops_ends_the_text(client: TestClient) -> None:
    ask = {"max_tokens": 30, "seed": 4, "ignore_eos": True}
    for path, asked in ((PATH, {"prompt": "abc"}), (CHAT, {"messages": ASK})):
        (choice,) = answered(client, path, **asked, **ask)["choices"]
        text = choice["text"] if path == PATH else choice["message"]["content"]
        stop = text[10:13]
        (choice,) = answered(client, path, **asked, **ask, stop=["never in it", "nor this", stop])["choices"]
        shorter = choice["text"] if path == PATH else choice["message"]["content"]
        assert (shorter, choice["finish_reason"]) == (text[: text.index(stop)], "stop"), path


def test_the_samples_of_several_streamed_prompts(client: TestClient) -> None:
    """The choices have the numbers that they have in the whole answer, and all prompts and samples are counted."""
    ask = {"prompt": ["ab", "xyz", "1"], "n": 2, "seed": 3, "max_tokens": 8, "ignore_eos": True, "echo": True}
    whole = answered(client, PATH, **ask)
    chunks = streamed(client, **ask, stream_options={"include_usage": True})
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"], choice["index"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
    assert len({choice["text"] for choice in whole["choices"]}) == 6
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"] == {"prompt_tokens": 2 + 3 + 1, "completion_tokens": 48, "total_tokens": 54}


def test_the_best_are_the_likeliest_per_token_whatever_their_length(client: TestClient) -> None:
    """A long sample is not worse for its length: by the sum of the log-probs another one would be chosen."""
    ask = {"seed": 2, "max_tokens": 30, "logit_bias": {"1": 4}}
    drawn = answered(client, PATH, prompt="abc", n=8, logprobs=0, **ask)["choices"]
    sums = [sum(choice["logprobs"]["token_logprobs"]) for choice in drawn]
    means = [total / len(choice["logprobs"]["tokens"]) for total, choice in zip(sums, drawn, strict=True)]
    likeliest = drawn[means.index(max(means))]["text"]
    assert likeliest != drawn[sums.index(max(sums))]["text"]
    (best,) = answered(client, PATH, prompt="abc", n=1, best_of=8, **ask)["choices"]
    assert best["text"] == likeliest


@pytest.mark.parametrize(("path", "asked"), [(PATH, {"prompt": "abc"}), (CHAT, {"messages": ASK})])
def test_an_answer_under_two_weights_names_those_it_began_with(app: FastAPI, path: str, asked: dict[str, Any]) -> None:
    service = app.state.services[NAME]
    service.start()

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            body = {**asked, "max_tokens": 80, "ignore_eos": True}
            asking = asyncio.ensure_future(client.post(path, json=body))
            while not await service.call(lambda: service.engine.stats.generated_tokens):
                await asyncio.sleep(0)
            await service.call(lambda: service.engine.set_version(1))
            assert not asking.done()
            answer = await asking
        assert answer.json()["usage"]["completion_tokens"] == 80
        assert answer.headers["X-Weight-Version"] == "0"
        assert answer.json()["system_fingerprint"] == f"{NAME}@0"
        await service.stop()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_what_runs_and_what_waits(model_folder: Path) -> None:
    """Three requests where one can run."""
    service = make_service(model_folder, max_batch=1)
    app = create_app({NAME: service}, ServeOptions())
    service.start()

    def figures() -> dict[str, float]:
        families = text_string_to_metric_families(app.state.metrics.text().decode())
        return {sample.name: sample.value for family in families for sample in family.samples}

    async def main() -> None:
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        streams = [await service.submit([5, 6, 7], params, stream=True) for _ in range(3)]
        await anext(streams[0])
        found = await service.call(figures)
        assert (found["upslope_requests_running"], found["upslope_requests_waiting"]) == (1, 2)
        await service.stop()

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture
def stream_of(model_folder: Path) -> Callable[[], Stream]:
    return lambda: Stream(lambda stream: None, 7, streamed=True)


def test_the_time_between_tokens(stream_of: Callable[[], Stream]) -> None:
    """Five tokens from 10 s to 14 s are a second apart; a sample of two tokens changes nothing."""

    async def main() -> None:
        stream = stream_of()
        for second in range(5):
            done = Completion([0] * 5, [], [], "stop") if second == 4 else None
            stream.note(Event(0, 0, token=3, completion=done), 10.0 + second)
        stream.note(Event(0, 1, token=3, completion=Completion([0] * 2, [], [], "stop")), 14.0)
        served = stream.served(14.0)
        assert (served.prompt_tokens, served.generated_tokens) == (7, 7)
        assert served.token_seconds == pytest.approx(1.0)

    asyncio.run(main())
