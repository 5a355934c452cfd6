"""/v1/chat/completions: what is sent reaches the engine, what the engine made is said, and nothing is dropped."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from tiny_model import tiny_folder

from upslope.data.chat import encode_prompt
from upslope.functional.logprobs import token_logprobs
from upslope.models.attention.context import PackedContext
from upslope.options import ServeOptions
from upslope.serving.server import create_app
from upslope.serving.service import Service
from upslope.types import Message, Prompt, SamplingParams

from .conftest import NAME, make_service
from .scripted import script

URL = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Say something."}]
HERMES = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def service_of(app: FastAPI) -> Service:
    return app.state.services[NAME]


def ask(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post(URL, json={"messages": ASK, "max_tokens": 8, **body})
    assert response.status_code == 200, response.text
    return response.json()


def texts_of(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def refused(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post(URL, json={"messages": ASK, "max_tokens": 8, **body})
    assert response.status_code == 400, response.text
    return response.json()["error"]


@pytest.fixture(scope="session")
def hermes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for tools and a template that writes them."""
    folder = tiny_folder(tmp_path_factory.mktemp("hermes") / "m", max_position_embeddings=4096)
    (folder / "chat_template.jinja").write_text(HERMES)
    return folder


@pytest.fixture
def hermes(hermes_folder: Path) -> Iterator[TestClient]:
    """A client of the model whose template knows tools."""
    app = create_app({NAME: make_service(hermes_folder)}, ServeOptions())
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def test_the_answer(app: FastAPI, client: TestClient) -> None:
    """Every field, and the text and counts are those of the engine asked directly with the same seed."""
    service = service_of(app)
    response = client.post(URL, json={"messages": ASK, "model": NAME, "max_tokens": 12, "seed": 5})
    answer = response.json()
    prompt = encode_prompt(service.tokenizer, Prompt(0, (Message("user", "Say something."),)))
    (own,) = make_service(Path(service.source)).engine.generate([prompt], SamplingParams(max_tokens=12, seed=5))
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", NAME)
    assert abs(answer["created"] - service.created) < 3600
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": own[0].text, "refusal": None}
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, own[0].finish_reason)
    drawn = len(own[0].tokens)
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": drawn,
        "total_tokens": len(prompt) + drawn,
    }
    assert answer["system_fingerprint"] == f"{NAME}@0"
    assert response.headers["x-weight-version"] == "0"


def test_seeds_and_samples(client: TestClient) -> None:
    """One seed, one text, whatever n is; without a seed the answers differ; the samples of a request differ."""
    texts = [texts_of(ask(client, seed=seed, n=n)) for seed, n in ((1, 4), (1, 2), (2, 4))]
    assert texts[0][:2] == texts[1]
    assert len(set(texts[0])) == 4
    assert texts[2] != texts[0]
    assert ask(client)["choices"][0]["message"] != ask(client)["choices"][0]["message"]


def test_best_of(client: TestClient) -> None:
    """The likeliest of those drawn, by mean log-prob per token; all that were drawn are counted."""
    drawn = ask(client, seed=3, n=6, logprobs=True)
    means = [_mean(choice) for choice in drawn["choices"]]
    best = ask(client, seed=3, n=2, best_of=6, logprobs=True)
    assert [_mean(choice) for choice in best["choices"]] == sorted(means, reverse=True)[:2]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"] == drawn["usage"]


def _mean(choice: dict[str, Any]) -> float:
    logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    return math.fsum(logprobs) / len(logprobs)


def test_beam_search(app: FastAPI, client: TestClient) -> None:
    """Two of four beams, best first, as the engine finds them."""
    texts = texts_of(ask(client, use_beam_search=True, n=2, best_of=4, max_tokens=6))
    service = service_of(app)
    prompt = encode_prompt(service.tokenizer, Prompt(0, (Message("user", "Say something."),)))
    params = SamplingParams(max_tokens=6, n=2, beam_width=4)
    (own,) = make_service(Path(service.source)).engine.generate([prompt], params)
    assert texts == [completion.text for completion in own]
    assert len(set(texts)) == 2


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_are_the_trainers(app: FastAPI, client: TestClient, temperature: float) -> None:
    """Of every token, the one that ends the reply too, and of the alternatives: what the packed forward pass gives."""
    service = service_of(app)
    body = {"seed": 1, "n": 2, "max_tokens": 40, "temperature": temperature, "return_token_ids": True}
    answer = ask(client, logprobs=True, top_logprobs=3, **body)
    model = service.engine.model
    for choice in answer["choices"]:
        tokens = answer["prompt_token_ids"] + choice["token_ids"]
        with torch.inference_mode():
            hidden = model(torch.tensor(tokens), PackedContext([len(tokens)]))
            logits = model.logits(hidden)[len(answer["prompt_token_ids"]) - 1 : -1]
        expected = token_logprobs(logits[None], torch.tensor(choice["token_ids"])[None], temperature or 1.0)[0]
        entries = choice["logprobs"]["content"]
        assert [e["logprob"] for e in entries] == pytest.approx(expected.tolist(), abs=1e-5)
        top = torch.log_softmax(logits / (temperature or 1.0), -1).topk(3).values
        assert [[a["logprob"] for a in e["top_logprobs"]] for e in entries] == [
            pytest.approx(row, abs=1e-5) for row in top.tolist()
        ]
        if temperature == 0:
            assert all(e["token"] == e["top_logprobs"][0]["token"] for e in entries)


def test_tokens_spell_the_text(app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of the entries, the ending token's excepted, are the text's; half a character is named by its byte."""
    script(monkeypatch, service_of(app), "né 漢!")
    answer = ask(client, logprobs=True, max_tokens=30)
    assert answer["choices"][0]["message"]["content"] == "né 漢!"
    entries = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(e["bytes"]) for e in entries[:-1]).decode() == "né 漢!"
    assert entries[-1]["token"] == "<|im_end|>"
    assert entries[1]["token"] == "bytes:\\xc3"
    assert all(e["top_logprobs"] == [] for e in entries)


def test_where_a_reply_ends(app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself, at a stop string (left out of the text), at a stop token, at the budget, at the end of the context."""
    script(monkeypatch, service_of(app), "one two three")
    stop_token = service_of(app).tokenizer.convert_tokens_to_ids("w")

    def end(**body: Any) -> tuple[str, str]:
        choice = ask(client, **{"max_tokens": 50, **body})["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]

    assert end() == ("one two three", "stop")
    assert end(stop=" th") == ("one two", "stop")
    assert end(stop=["x", "o t", " two"]) == ("one", "stop")
    assert end(stop_token_ids=[stop_token]) == ("one t", "stop")
    assert end(max_tokens=5) == ("one t", "length")
    assert end(max_tokens=None, max_completion_tokens=5) == ("one t", "length")
    assert end(max_tokens=5, max_completion_tokens=5) == ("one t", "length")


def test_without_a_budget_the_context_is(app: FastAPI, client: TestClient) -> None:
    """No max_tokens: as many as fit."""
    usage = ask(client, max_tokens=None, ignore_eos=True)["usage"]
    assert usage["total_tokens"] == service_of(app).max_positions == 512


def test_every_parameter_reaches_the_engine(app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = script(monkeypatch, service_of(app), "ok")
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "seed": 11,
        "n": 2,
    }
    bias, stop = {"5": -3.0}, ["a", "b"]
    ask(client, **given, logit_bias=bias, stop=stop, logprobs=True, top_logprobs=4, user="somebody")
    params = asked[0]["params"]
    assert {name: getattr(params, name) for name in given} == given
    assert (params.logit_bias, params.stop, params.logprobs, params.max_tokens) == ({5: -3.0}, ("a", "b"), 4, 8)


def test_logit_bias_decides(client: TestClient) -> None:
    answer = ask(client, logit_bias={"70": 100}, temperature=0.5, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == [70] * 8


def prompt_of(app: FastAPI, asked: list[dict[str, Any]]) -> str:
    return service_of(app).tokenizer.decode(asked[-1]["prompt"])


def test_messages_become_the_prompt(app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = script(monkeypatch, service_of(app), "ok")
    messages = [
        {"role": "developer", "content": "Be brief.", "type": "text"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
        {"role": "assistant", "content": "c", "refusal": None, "function_call": None},
        {"role": "tool", "content": "d", "tool_call_id": "call_1"},
    ]
    ask(client, messages=messages)
    turns = ["system\nBe brief.", "user\nab", "assistant\nc", "tool\nd"]
    assert prompt_of(app, asked) == "".join(f"<|im_start|>{t}<|im_end|>\n" for t in turns) + "<|im_start|>assistant\n"


def test_going_on_with_the_last_message(app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt ends where the assistant's text does, white space included, with a border between tokens there."""
    asked = script(monkeypatch, service_of(app), "!")
    messages = [*ASK, {"role": "assistant", "content": "Well, "}]
    answer = ask(client, messages=messages, continue_final_message=True)
    assert prompt_of(app, asked).endswith("<|im_start|>assistant\nWell, ")
    assert answer["choices"][0]["message"]["content"] == "!"
    ask(client, messages=messages)
    assert prompt_of(app, asked).endswith("Well, <|im_end|>\n<|im_start|>assistant\n")
    ask(client, add_generation_prompt=False)
    assert prompt_of(app, asked).endswith("Say something.<|im_end|>\n")
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert "exclude" in refused(client, messages=messages, **both)["message"]
    assert "last message" in refused(client, continue_final_message=True)["message"]


def test_json_objects(app: FastAPI, client: TestClient) -> None:
    bias = {str(i): 12 for i in service_of(app).tokenizer.convert_tokens_to_ids(['"', "}"])}
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=200, n=4, logit_bias=bias, seed=0)
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_json_that_follows_a_schema(client: TestClient) -> None:
    wanted = schema_format(CITY)
    answer = ask(client, response_format=wanted, max_tokens=40, n=16, seed=0)
    texts = texts_of(answer)
    assert set(texts) == {'{"city": "Rome"}', '{"city": "Oslo"}'}
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    cut = ask(client, response_format=wanted, max_tokens=4)["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ('{"ci', "length")
    beams = ask(client, response_format=wanted, max_tokens=40, use_beam_search=True, n=2)
    assert set(texts_of(beams)) == set(texts)


def test_schemas_that_cannot_be_enforced(client: TestClient) -> None:
    error = refused(client, response_format=schema_format({"type": "object", "not": {}}))
    assert (error["param"], error["code"]) == ("response_format", "unsupported_schema")
    assert "not" in error["message"]


def test_no_chat_template(model_folder: Path) -> None:
    service = make_service(model_folder)
    service.tokenizer.chat_template = None
    with TestClient(create_app({NAME: service}, ServeOptions()), base_url="http://127.0.0.1") as client:
        error = refused(client)
    assert "no chat template" in error["message"]
    assert "/v1/completions" in error["message"]


def test_new_weights_are_named(app: FastAPI, client: TestClient, tmp_path: Path) -> None:
    """After a swap the answer carries the next version, and is that of the new weights."""
    old = ask(client, seed=1)
    folder = tiny_folder(tmp_path / "other", seed=1)
    service = service_of(app)
    assert client.portal is not None
    client.portal.call(service.swap, str(folder))
    response = client.post(URL, json={"messages": ASK, "max_tokens": 8, "seed": 1})
    assert response.headers["x-weight-version"] == "1"
    assert response.json()["system_fingerprint"] == f"{NAME}@1"
    assert response.json()["choices"][0]["message"] != old["choices"][0]["message"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
    ({"messages": [{"content": "x"}]}, "role"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"messages": [{"role": "user", "content": 3}]}, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "type"),
    ({"messages": [{"role": "user", "content": "x", "audio": {"id": "a"}}]}, "audio"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "tool_call_id"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "c"}]}]}, "tool_calls"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 8, "max_completion_tokens": 9}, "max_completion_tokens"),
    ({"max_tokens": 100000}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"258": 1}}, "logit_bias"),
    ({"stop": ""}, "stop"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"echo": True}, "echo"),
    ({"prompt": "x"}, "prompt"),
    ({"functions": []}, "functions"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "json_schema"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ({"response_format": {"type": "json_object"}, "tools": [WEATHER]}, "response_format"),
    ({"tools": [{"type": "code_interpreter"}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "name"),
    ({"tools": [WEATHER, WEATHER]}, "same name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
]


@pytest.mark.parametrize(("body", "named"), WRONG, ids=[f"{i}-{named}" for i, (_, named) in enumerate(WRONG)])
def test_wrong_bodies(client: TestClient, body: dict[str, Any], named: str) -> None:
    """400 that names the field, in OpenAI's shape."""
    error = refused(client, **body)
    assert named in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


def test_a_conversation_that_does_not_fit(client: TestClient) -> None:
    error = refused(client, messages=[{"role": "user", "content": "x" * 600}])
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_unknown_model(client: TestClient) -> None:
    response = client.post(URL, json={"messages": ASK, "model": "gpt-7"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_many_at_once(client: TestClient) -> None:
    """Two dozen requests at one time, constrained ones among them: each gets the text it gets alone."""
    bodies = [{"seed": i, **({"response_format": schema_format(CITY)} if i % 3 == 0 else {})} for i in range(24)]
    alone = [ask(client, max_tokens=24, **body)["choices"] for body in bodies]

    async def post(body: dict[str, Any]) -> Any:
        return await asyncio.to_thread(ask, client, max_tokens=24, **body)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(post(body) for body in bodies))

    together = asyncio.run(all_of_them())
    assert [answer["choices"] for answer in together] == alone
