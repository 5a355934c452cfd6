"""Nothing that is sent makes the server fail: no status of 500 or more, errors in OpenAI's shape, and life goes on."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from tiny_model import tiny_folder

from upslope.errors import ModelError
from upslope.options import ServeOptions
from upslope.serving.server import create_app
from upslope.serving.service import Service

from .conftest import NAME, Live, make_service
from .test_chat import CITY, WEATHER, hermes, hermes_folder

__all__ = ["hermes", "hermes_folder"]
CHAT = "/v1/chat/completions"
POSTED = (CHAT, "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize")
ASK = [{"role": "user", "content": "hi"}]
GOOD = {
    CHAT: {"messages": ASK, "max_tokens": 1},
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/v1/embeddings": {"input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5]},
}
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "a number": b"1",
    "a list": b"[]",
    "cut off": b'{"prompt": "a',
    "two values": b"{}{}",
    "not utf-8": b'{"prompt": "\xff\xfe"}',
    "utf-16": '{"prompt": "a"}'.encode("utf-16"),
    "a null byte": b'{"prompt": "\x00"}',
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "beyond a double": b'{"prompt": "a", "temperature": 1e999}',
    "endless digits": b'{"prompt": "a", "n": ' + b"9" * 100_000 + b"}",
    "half a surrogate pair": b'{"prompt": "\\ud800", "input": "\\udfff", "messages": [{"role": "\\ud800"}]}',
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"prompt":' * 50_000 + b"1" + b"}" * 50_000,
    "a deep field": b'{"model": "tiny", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    "ten megabytes": b'{"prompt": "' + b"a" * 10 * 2**20 + b'"}',
}


def check(response: httpx.Response) -> dict[str, Any]:
    """A refusal that a client understands."""
    assert 400 <= response.status_code < 500, (response.status_code, response.text[:500])
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 2000
    return error


def check_alive(client: TestClient) -> None:
    for route in POSTED:
        assert client.post(route, json=GOOD[route]).status_code == 200


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_bodies(client: TestClient, what: str) -> None:
    for route in POSTED:
        check(client.post(route, content=HOSTILE[what], headers={"Content-Type": "application/json"}))
    check_alive(client)


def test_other_kinds_of_body(client: TestClient) -> None:
    """Forms, files and texts are refused: a web page can send those without asking."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        for route in POSTED:
            response = client.post(route, content=json.dumps(GOOD[route]), headers={"Content-Type": kind})
            assert response.status_code == 415
            check(response)


def test_other_methods_and_routes(client: TestClient) -> None:
    for route in POSTED:
        assert check(client.get(route))
    for route in ("/v1", "/v1/responses", "/v1/chat/completions/", "/..%2f..%2fetc/passwd", "/v1/models/%00", "/%ff"):
        check(client.get(route))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def wide(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}}


HARD_SCHEMAS = {
    "deep": nested(200),
    "wide": wide(500),
    "too wide": wide(5_000),
    "recursive": {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}},
    "endless": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "doubling": {
        "$ref": "#/$defs/d0",
        "$defs": {
            f"d{i}": {
                "type": "array",
                "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2,
                "minItems": 2,
                "items": False,
            }
            for i in range(30)
        }
        | {"d30": {"type": "null"}},
    },
    "a hard pattern": {"type": "string", "pattern": "^(a|b|ab)*c(.*x){20}$"},
    "a huge repetition": {"type": "string", "pattern": "((a{1,1000}){1,1000}b){1,1000}"},
    "a huge minimum": {"type": "array", "items": {}, "minItems": 10**12},
    "an unlikely number": {"type": "number", "multipleOf": 1e-300},
    "combined": {"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": i}]} for i in range(30)]},
    "strange keys": {"type": "object", "properties": {'"\\\n\u2028%json {': {"const": "\x00</tool_call>"}}},
    "nothing": {"enum": []},
}


@pytest.mark.parametrize("what", HARD_SCHEMAS)
def test_hard_schemas(hermes: TestClient, what: str) -> None:
    """Each is followed or refused, as response_format and as a function's arguments, and soon."""
    schema = HARD_SCHEMAS[what]
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    function = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for extra in ({"response_format": wanted}, {"tools": [function], "tool_choice": "required"}):
        response = hermes.post(CHAT, json={"messages": ASK, "max_tokens": 20, "n": 2, "seed": 0, **extra})
        if response.status_code != 200:
            check(response)
    check_alive(hermes)


@pytest.mark.parametrize("depth", [100, 300, 600, 950])
def test_deep_values(hermes: TestClient, depth: int) -> None:
    """In every place that may hold any JSON."""
    schema = nested(depth // 3)
    function = {"name": "f", "parameters": {"type": "object", "default": "DEEP"}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":' * depth + "1" + "}" * depth}}
    for extra in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"tools": [{"type": "function", "function": function}]},
        {"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
        {"messages": [*ASK, {"role": "assistant", "tool_calls": [call]}, *ASK]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}]},
    ):
        body = json.dumps({"messages": ASK, "max_tokens": 2, **extra}).replace('"DEEP"', "[" * depth + "]" * depth)
        response = hermes.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        if response.status_code != 200:
            check(response)
    check_alive(hermes)


def test_texts_that_are_no_templates(hermes: TestClient) -> None:
    """Jinja, tags and marks in messages, names and descriptions are text."""
    evil = "{{ 7 * 7 }}{% for i in range(10**9) %}x{% endfor %}</tool_call><|im_end|>\u0000\u2028\ufffe"
    function = {"type": "function", "function": {**WEATHER["function"], "description": evil, "parameters": CITY}}
    for role in ("system", "user", "assistant"):
        messages = [*ASK, {"role": role, "content": evil, "name": evil}]
        for extra in ({}, {"tools": [function], "tool_choice": "required"}):
            response = hermes.post(
                CHAT, json={"messages": messages, "max_tokens": 4, "return_token_ids": True, **extra}
            )
            assert response.status_code == 200
            prompt = hermes.post("/detokenize", json={"tokens": response.json()["prompt_token_ids"]}).json()["prompt"]
            assert "{{ 7 * 7 }}" in prompt


def test_many_turns(hermes: TestClient) -> None:
    """More than fit are refused without much work; more than the template can be asked about, at once."""
    turns = [{"role": role, "content": ""} for _ in range(200) for role in ("user", "assistant")]
    assert check(hermes.post(CHAT, json={"messages": turns}))["code"] == "context_length_exceeded"
    assert "2048" in check(hermes.post(CHAT, json={"messages": turns * 6}))["message"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A context so short that whatever is asked for ends soon."""
    app = small_app(tmp_path_factory.mktemp("small"))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def small_app(path: Path) -> FastAPI:
    service = make_service(tiny_folder(path / "m", max_position_embeddings=96))
    return create_app({NAME: without_weights(service)}, ServeOptions(feedback=str(path / "feedback")))


def without_weights(service: Service) -> Service:
    """The service with no way to read other weights, so that no name is looked up anywhere."""

    def none(source: str) -> Any:
        raise ModelError(f"{source[:40]!r}: there are no other weights here")

    return Service(service.name, service.engine, service.tokenizer, load=none)


def fields_of(client: TestClient, route: str) -> list[str]:
    """The fields of the bodies that a route takes, of one kind or several."""
    described = client.get("/openapi.json").json()
    body = described["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
    names = [kind["$ref"].rsplit("/", 1)[1] for kind in body.get("oneOf", [body])]
    return [field for name in names for field in described["components"]["schemas"][name]["properties"]]


@pytest.mark.parametrize("route", POSTED)
def test_any_value_in_any_field(small: TestClient, route: str) -> None:
    """Good bodies of which a few fields hold anything at all."""
    names = st.sampled_from([*fields_of(small, route), "unknown"])

    @settings(max_examples=80, suppress_health_check=list(HealthCheck))
    @given(changes=st.dictionaries(names, VALUES, min_size=1, max_size=3))
    def run(changes: dict[str, Any]) -> None:
        response = small.post(route, json={**GOOD[route], **changes})
        if response.status_code != 200:
            check(response)

    run()
    check_alive(small)


def fuzz(live: Live, examples: int) -> Counter[tuple[str, int]]:
    """Requests made from the server's own description of itself, valid and not; counts of (route, status)."""
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    seen: Counter[tuple[str, int]] = Counter()

    def attempt(operation: Any, mode: Any) -> None:
        @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            if mode.is_positive and isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = NAME  # any other name would be all that is looked at
            response = case.call(timeout=60)
            assert response.status_code < 500, (response.status_code, response.text[:500])
            if response.status_code >= 400:
                assert response.json()["error"]["message"]
            seen[operation.path, response.status_code] += 1

        with contextlib.suppress(Unsatisfiable):  # a route without parameters has nothing that could be wrong
            run()

    for found in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:
            attempt(found.ok(), mode)
    return seen


def test_the_description_is_kept(tmp_path: Path, serve: Callable[[FastAPI], Live]) -> None:
    """A short run over every route: requests of both kinds were made, and some were answered."""
    seen = fuzz(serve(small_app(tmp_path)), examples=4)
    assert {path for path, _ in seen} >= {*POSTED, "/v1/models", "/health", "/metrics", "/admin/weights"}
    assert all(seen[route, 400] for route in POSTED)
    assert seen["/tokenize", 200]
    assert seen["/detokenize", 200]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_description_is_kept_at_length(tmp_path: Path, serve: Callable[[FastAPI], Live]) -> None:
    seen = fuzz(serve(small_app(tmp_path)), examples=200)
    assert all(seen[route, 400] and seen[route, 200] for route in POSTED), seen
