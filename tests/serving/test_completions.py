"""/v1/completions: every field does what it says, streamed or not, and the log-probs are the trainer's."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from tiny_seq2seq import tiny as tiny_seq2seq
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from upslope.data.batching import collate
from upslope.engine import Engine
from upslope.models.files.loading import load_model, save_model
from upslope.models.protocol import CausalModel
from upslope.options import ServeOptions
from upslope.serving.server import create_app
from upslope.training.step import score
from upslope.types import Example, SamplingParams

from .conftest import NAME, Live, make_service

PATH = "/v1/completions"


@pytest.fixture
def alone(model_folder: Path) -> Engine:
    """An engine over the same weights, with nothing else to do."""
    return make_service(model_folder).engine


@pytest.fixture
def complete(client: TestClient) -> Callable[..., dict[str, Any]]:
    """The answer to a request, which must be a good one."""

    def ask(prompt: Any = "abc", **fields: Any) -> dict[str, Any]:
        answer = client.post(PATH, json={"model": NAME, "prompt": prompt, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    return ask


@pytest.fixture
def stream(client: TestClient) -> Callable[..., list[Any]]:
    """The events of a streamed request."""

    def ask(prompt: Any = "abc", **fields: Any) -> list[Any]:
        answer = client.post(PATH, json={"model": NAME, "prompt": prompt, "stream": True, **fields})
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["X-Weight-Version"] == "0"
        found = events(answer.text)
        assert {chunk["system_fingerprint"] for chunk in found[:-1]} == {f"{NAME}@0"}
        return found

    return ask


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def ids(text: str) -> list[int]:
    """The tiny tokenizer's: one per byte, in the order of the byte-level letters."""
    from tiny_model import tiny_tokenizer

    return tiny_tokenizer()(text)["input_ids"]


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def trainer_logprobs(model: CausalModel, tokens: list[int]) -> list[float]:
    """Log-probs of all tokens but the first, by the trainer's own scoring."""
    example = Example(tokens, [False] + [True] * (len(tokens) - 1))
    logp = score(model, [collate([example])]).logp_N
    assert logp is not None
    return logp.tolist()


def test_the_shape_of_an_answer(client: TestClient) -> None:
    answer = client.post(PATH, json={"model": NAME, "prompt": "abc", "max_tokens": 4, "ignore_eos": True})
    body = answer.json()
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"], body["system_fingerprint"]) == ("text_completion", NAME, f"{NAME}@0")
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    (choice,) = body["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    assert answer.headers["X-Weight-Version"] == "0"
    assert "access-control-allow-origin" not in answer.headers


def test_every_form_of_a_prompt(complete: Any, alone: Engine) -> None:
    (wanted,) = alone.generate([ids("abc")], SamplingParams(max_tokens=8, temperature=0.0))[0]
    other = alone.generate([ids("xy z")], SamplingParams(max_tokens=8, temperature=0.0))[0][0]
    ask = {"max_tokens": 8, "temperature": 0}
    assert texts(complete("abc", **ask)) == [wanted.text]
    assert texts(complete(["abc"], **ask)) == [wanted.text]
    assert texts(complete(ids("abc"), **ask)) == [wanted.text]
    assert texts(complete([ids("abc"), ids("xy z")], **ask)) == [wanted.text, other.text]
    many = complete(["abc", "xy z"], n=2, **ask)
    assert texts(many) == [wanted.text] * 2 + [other.text] * 2
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_k": 3}, {"top_k": 3}),
        ({"top_k": -1}, {}),
        ({"min_p": 0.8}, {"min_p": 0.8}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": -2}, {"frequency_penalty": -2.0}),
        ({"logit_bias": {"70": 5, "71": -100}}, {"logit_bias": {70: 5.0, 71: -100.0}}),
        ({"stop_token_ids": list(range(2, 100))}, {"stop_token_ids": tuple(range(2, 100))}),
        ({"n": 3}, {"n": 3}),
        ({"use_beam_search": True, "best_of": 4, "n": 2}, {"beam_width": 4, "n": 2}),
        (
            {"use_beam_search": True, "n": 3, "length_penalty": 2.5},
            {"beam_width": 3, "n": 3, "length_penalty": 2.5},
        ),
    ],
    ids=str,
)
def test_each_field_reaches_the_engine(
    complete: Any, stream: Any, alone: Engine, fields: dict[str, Any], params: dict[str, Any]
) -> None:
    wanted = alone.generate([ids("abc")], SamplingParams(max_tokens=20, seed=11, **params), keys=[0])[0]
    found = complete(max_tokens=20, seed=11, return_token_ids=True, **fields)
    assert [choice["token_ids"] for choice in found["choices"]] == [one.tokens for one in wanted]
    assert texts(found) == [one.text for one in wanted]
    assert [choice["finish_reason"] for choice in found["choices"]] == [one.finish_reason for one in wanted]
    assert found["choices"][0]["prompt_token_ids"] == ids("abc")
    pieces = stream(max_tokens=20, seed=11, return_token_ids=True, **fields)
    for i, one in enumerate(wanted):
        assert [token for c in choices(pieces, i) for token in c["token_ids"]] == one.tokens


def choices(chunks: list[Any], index: int = 0) -> list[dict[str, Any]]:
    """The parts of one choice, in order."""
    return [c for chunk in chunks if chunk != "[DONE]" for c in chunk["choices"] if c["index"] == index]


def test_a_seed_gives_the_same_text_whatever_else_runs(client: TestClient, complete: Any) -> None:
    ask = {"max_tokens": 24, "seed": 5, "ignore_eos": True}
    one = texts(complete("abc", **ask))
    assert texts(complete(["x", "abc", "abc"], **ask))[1:] == one * 2
    assert texts(complete("abc", n=2, **ask))[:1] == one
    found: list[list[str]] = []

    def other(seed: int) -> None:
        body = {"prompt": "abc" * seed, "max_tokens": 30, "seed": seed}
        assert client.post(PATH, json=body).status_code == 200

    threads = [threading.Thread(target=other, args=[seed]) for seed in range(1, 6)]
    threads.append(threading.Thread(target=lambda: found.append(texts(complete("abc", **ask)))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [one]
    assert texts(complete("abc", **{**ask, "seed": 6})) != one


def test_without_a_seed_every_answer_differs(complete: Any) -> None:
    ask = {"max_tokens": 24, "ignore_eos": True}
    found = texts(complete(["abc", "abc"], n=2, **ask)) + texts(complete("abc", **ask))
    assert len(set(found)) == 5


def test_best_of_takes_the_likeliest_per_token(complete: Any) -> None:
    ask = {"max_tokens": 12, "seed": 2, "logprobs": 0}
    every = complete(n=6, **ask)["choices"]

    def mean(choice: dict[str, Any]) -> float:
        own = choice["logprobs"]["token_logprobs"]
        return sum(own) / len(own)

    ranked = sorted(every, key=mean, reverse=True)
    chosen = complete(n=2, best_of=6, **ask)
    assert texts(chosen) == [choice["text"] for choice in ranked[:2]]
    assert mean(ranked[0]) > mean(ranked[2])
    drawn = sum(len(choice["logprobs"]["tokens"]) for choice in every)
    assert chosen["usage"]["completion_tokens"] == drawn, "what was drawn and thrown away was work, too"


@pytest.mark.parametrize("given", ["abc", ids("abc"), "é 你好 \U0001f600."])
def test_echo_with_logprobs_is_what_the_trainer_computes(complete: Any, model_folder: Path, given: Any) -> None:
    tokens = given if isinstance(given, list) else ids(given)
    found = complete(given, max_tokens=5, logprobs=3, echo=True, temperature=0, return_token_ids=True)["choices"][0]
    listed, drawn = found["logprobs"], found["token_ids"]
    wanted = trainer_logprobs(load_model(model_folder), tokens + drawn)
    assert listed["token_logprobs"][0] is None
    assert listed["top_logprobs"][0] is None
    assert listed["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-5)
    assert len(listed["tokens"]) == len(tokens) + len(drawn)
    for own, name, best in zip(*(listed[k][1:] for k in ("token_logprobs", "tokens", "top_logprobs")), strict=True):
        assert best[name] == own
        assert len(best) in (3, 4)
        assert max(best.values()) >= own
    greedy = listed["token_logprobs"][len(tokens) :]
    assert greedy == [max(best.values()) for best in listed["top_logprobs"][len(tokens) :]]


def test_offsets_point_into_the_text(complete: Any) -> None:
    """Where a token is text, the text at its offset begins with it; bytes inside a character have its offset."""
    given = "é 你 x"
    found = complete(given, max_tokens=3, logprobs=0, echo=True, seed=1)["choices"][0]
    listed = found["logprobs"]
    assert found["text"].startswith(given)
    assert listed["tokens"][:2] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert listed["text_offset"][: len(ids(given))] == [0, 0, 1, 2, 2, 2, 3, 4]
    for name, place in zip(listed["tokens"], listed["text_offset"], strict=True):
        if not name.startswith("bytes:") and name != "<|im_end|>":
            assert found["text"][place:].startswith(name)


def test_special_tokens_of_a_prompt_are_part_of_its_text(complete: Any) -> None:
    text = "<|im_start|>ab"
    for given in (text, ids(text)):
        found = complete(given, max_tokens=0, logprobs=0, echo=True)["choices"][0]
        assert found["text"] == text
        assert found["logprobs"]["text_offset"] == [0, 12, 13]


def test_as_lm_eval_scores(complete: Any, model_folder: Path) -> None:
    """A batch of token lists, one token more than asked about; the sum over the continuation, and whether greedy."""
    model = load_model(model_folder)
    pairs = [(ids("1 + 1 ="), ids(" 2")), (ids("a"), ids("bcdef"))]
    found = complete([a + b for a, b in pairs], temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    for (context, continuation), choice in zip(pairs, found["choices"], strict=True):
        own = choice["logprobs"]["token_logprobs"][len(context) : -1]
        wanted = trainer_logprobs(model, context + continuation)[len(context) - 1 :]
        assert sum(own) == pytest.approx(sum(wanted), abs=1e-4)
        assert len(own) == len(continuation)


def test_scoring_alone(complete: Any) -> None:
    found = complete("abc", max_tokens=0, echo=True, logprobs=1)
    assert found["choices"][0]["text"] == "abc"
    assert len(found["choices"][0]["logprobs"]["tokens"]) == 3
    assert found["usage"]["completion_tokens"] == 0
    assert texts(complete(ids("abc"), max_tokens=0, echo=True)) == ["abc"]
    assert texts(complete("abc", max_tokens=3, echo=True, temperature=0))[0].startswith("abc")


def test_streaming_adds_up(stream: Any, complete: Any) -> None:
    ask = {"max_tokens": 30, "seed": 9, "n": 2, "ignore_eos": True}
    chunks = stream(**ask, stream_options={"include_usage": True})
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"] == {"prompt_tokens": 3, "completion_tokens": 60, "total_tokens": 63}
    assert all(chunk["usage"] is None for chunk in chunks[:-2])
    for index, text in enumerate(texts(complete(**ask))):
        parts = choices(chunks, index)
        assert "".join(part["text"] for part in parts) == text
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    assert "usage" not in stream(max_tokens=2)[0]


def test_streamed_logprobs_add_up(stream: Any, complete: Any) -> None:
    ask = {"max_tokens": 12, "seed": 9, "logprobs": 2}
    (whole,) = complete(**ask)["choices"]
    parts = choices(stream(**ask))
    for name, values in whole["logprobs"].items():
        assert [value for part in parts for value in part["logprobs"][name]] == values


def test_streams_of_several_prompts(stream: Any, complete: Any) -> None:
    ask = {"max_tokens": 6, "temperature": 0, "echo": True}
    chunks = stream(["ab", "xyz"], **ask)
    for index, text in enumerate(texts(complete(["ab", "xyz"], **ask))):
        assert "".join(part["text"] for part in choices(chunks, index)) == text


def test_stop_text_never_shows(stream: Any, complete: Any) -> None:
    """Whatever stop is taken out of the text: the answer ends before it, and no chunk shows the beginning of it."""
    ask = {"max_tokens": 60, "seed": 4, "ignore_eos": True}
    text = texts(complete(**ask))[0]
    for start, length in ((5, 1), (10, 3), (20, 8)):
        stop = text[start : start + length]
        before = text[: text.index(stop)]
        for given in (stop, [stop, "never in it"]):
            (whole,) = complete(stop=given, **ask)["choices"]
            assert (whole["text"], whole["finish_reason"]) == (before, "stop")
        parts = choices(stream(stop=stop, **ask))
        assert "".join(part["text"] for part in parts) == before
        assert parts[-1]["finish_reason"] == "stop"


def test_an_error_on_the_way_is_an_event(client: TestClient, app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = app.state.services[NAME].engine
    step, count = engine.step, iter(range(100))
    monkeypatch.setattr(engine, "step", lambda: step() if next(count) < 3 else 1 / 0)
    answer = client.post(PATH, json={"prompt": "abc", "max_tokens": 50, "stream": True, "ignore_eos": True})
    found = events(answer.text)
    assert found[-1] == "[DONE]"
    assert found[-2]["error"]["type"] == "server_error"
    assert "has failed" in found[-2]["error"]["message"]
    assert client.get("/health").status_code == 503
    late = client.post(PATH, json={"prompt": "abc"})
    assert late.status_code == 500
    assert "restart the server" in late.json()["error"]["message"]


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_slot(live: Live, streamed: bool) -> None:
    engine = live.app.state.services[NAME].engine
    started, cancelled = threading.Event(), threading.Event()
    step, cancel = engine.step, engine.cancel

    def stepping() -> Any:
        started.set()
        return step()

    def cancelling(request_id: int) -> Any:
        result = cancel(request_id)
        cancelled.set()
        return result

    engine.step, engine.cancel = stepping, cancelling
    body = json.dumps({"prompt": "abc", "max_tokens": 500, "ignore_eos": True, "n": 64, "stream": streamed})
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    address = live.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=30) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert started.wait(30)
        if streamed:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert cancelled.wait(30), "nobody told the engine"
    assert not engine.scheduler.everyone
    assert httpx.post(live.url + PATH, json={"prompt": "abc", "max_tokens": 1}).status_code == 200


def test_a_client_that_left_before_the_first_event_frees_its_slot(model_folder: Path) -> None:
    """Nobody has begun to read the events then, so that nobody can stop reading them either."""
    service = make_service(model_folder)
    app = create_app({NAME: service}, ServeOptions())
    service.start()
    body = json.dumps({"prompt": "abc", "max_tokens": 500, "ignore_eos": True, "stream": True}).encode()
    received = [{"type": "http.request", "body": body, "more_body": False}]
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": headers}

    async def receive() -> Any:
        return received.pop() if received else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.Event().wait()  # nobody is there to read

    async def main() -> None:
        await app(scope, receive, send)
        assert not await service.call(lambda: service.engine.busy)
        await service.stop()

    asyncio.run(main())


def test_an_encoder_decoder_is_served_too(tmp_path: Path) -> None:
    """The prompt is its source; it has no log-probs, so that it cannot be echoed."""
    names = ["<pad>", "</s>", *(f"w{i}" for i in range(2, 97))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="w2")
    folder = save_model(tiny_seq2seq(), tmp_path / "pair", tokenizer=fast)
    service = make_service(folder, "pair")
    (wanted,) = service.engine.generate([service.tokens_of("w5 w6 w7")], SamplingParams(max_tokens=6, temperature=0.0))
    ask = {"prompt": "w5 w6 w7", "max_tokens": 6, "temperature": 0}
    with TestClient(create_app({"pair": service}, ServeOptions()), base_url="http://127.0.0.1") as client:
        found = client.post(PATH, json={**ask, "logprobs": 1}).json()
        assert texts(found) == [wanted[0].text]
        assert found["choices"][0]["logprobs"]["token_logprobs"] == wanted[0].policy_logprobs
        refused = client.post(PATH, json={**ask, "echo": True})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "echo"
        tokens = client.post("/tokenize", json={"prompt": "w5 w6", "return_token_strs": True}).json()
        assert tokens["token_strs"] == ["w5", "w6", "</s>", "<pad>"]
        assert client.get("/tokenizer_info").json()["eos_token"] == "</s>"


def test_the_openai_client(live: Live) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused") as client:
        assert [model.id for model in client.models.list()] == [NAME]
        ask = {"model": NAME, "prompt": "abc", "max_tokens": 6, "temperature": 0}
        whole = client.completions.create(**ask, logprobs=1, echo=True)
        assert whole.choices[0].logprobs.token_logprobs[0] is None
        parts = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        assert "abc" + "".join(part.choices[0].text for part in parts[:-1]) == whole.choices[0].text
        assert parts[-1].usage.completion_tokens == 6
        with pytest.raises(openai.BadRequestError, match="suffix: this field is not supported"):
            client.completions.create(**ask, suffix="x")
        with pytest.raises(openai.NotFoundError, match="no model 'other' is served here, only tiny"):
            client.completions.create(**{**ask, "model": "other"})


def test_the_bundled_model_is_served_with_the_trainers_logprobs(smollm2_folder: Path) -> None:
    service = make_service(smollm2_folder, "smollm2")
    app = create_app({"smollm2": service}, ServeOptions())
    ask = {"prompt": "The capital of France is", "max_tokens": 4, "logprobs": 1, "echo": True, "temperature": 0}
    with TestClient(app, base_url="http://127.0.0.1") as client:
        (found,) = client.post(PATH, json={**ask, "return_token_ids": True}).json()["choices"]
    assert "Paris" in found["text"]
    wanted = trainer_logprobs(service.engine.model, found["prompt_token_ids"] + found["token_ids"])
    assert found["logprobs"]["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-5)
