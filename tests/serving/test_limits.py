"""What is refused before a route sees it, and what a body may not say: right status, clear message, never a 500."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from upslope.errors import ConfigError
from upslope.options import ServeOptions
from upslope.serving.server import create_app

from .conftest import NAME, Gate, Live, make_service

PATH = "/v1/completions"
KEY = "top sécret"


@pytest.fixture
def guarded(model_folder: Path) -> Iterator[TestClient]:
    """A server that wants a key and takes small bodies only."""
    app = create_app({NAME: make_service(model_folder)}, ServeOptions(api_key=KEY, max_body_mb=0.001))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def error(answer: Any, status: int) -> dict[str, Any]:
    """The refusal in an answer, which must have that status and OpenAI's shape."""
    assert answer.status_code == status, answer.text
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def routes(app: FastAPI) -> list[tuple[str, str]]:
    schema = app.openapi()["paths"]
    return [(method.upper(), path.replace("{name}", NAME)) for path, ways in schema.items() for method in ways]


def test_every_route_but_health_wants_the_key(guarded: TestClient) -> None:
    for method, path in [*routes(guarded.app), ("GET", "/"), ("GET", "/openapi.json"), ("GET", "/no/such/route")]:
        answer = guarded.request(method, path)
        if path == "/health":
            assert answer.status_code == 200
        else:
            assert error(answer, 401)["code"] == "invalid_api_key", path
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    opened = guarded.get("/", headers={"Accept": "text/html,*/*"})
    assert opened.headers["WWW-Authenticate"].startswith("Basic"), "a browser asks its user then"


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        ("Basic " + base64.b64encode(f"anyone:{KEY}".encode()).decode(), 200),
        ("Bearer wrong", 401),
        ("Bearer", 401),
        ("Basic !!!", 401),
        ("Basic " + base64.b64encode(b"\xff\xfe").decode(), 401),
        (f"Digest {KEY}", 401),
        (f"Token {KEY}", 401),
        (KEY, 401),
    ],
)
def test_keys(guarded: TestClient, authorization: str, status: int) -> None:
    answer = guarded.get("/v1/models", headers={"Authorization": authorization.encode("utf-8")})
    assert answer.status_code == status, answer.text


def test_the_key_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSLOPE_API_KEY", "from outside")
    assert ServeOptions().key == "from outside"
    assert ServeOptions(api_key="given").key == "given"
    monkeypatch.setenv("UPSLOPE_API_KEY", " ")
    with pytest.raises(ConfigError, match="API key is empty"):
        ServeOptions().validate()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "example.org"])
def test_an_open_address_needs_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPSLOPE_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="can be reached from other machines: set --api-key"):
        ServeOptions(host=host).validate()
    ServeOptions(host=host, api_key="k").validate()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000"])
def test_this_server_by_its_names(client: TestClient, host: str) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_a_name_that_was_rebound_is_refused(client: TestClient, host: str) -> None:
    assert error(client.get("/v1/models", headers={"Host": host}), 403)["code"] == "bad_host"


def test_other_pages_may_not_send_requests(client: TestClient) -> None:
    ask = {"prompt": "abc", "max_tokens": 1}
    for origin in ("https://evil.example", "null", "http://127.0.0.1:9"):
        assert error(client.post(PATH, json=ask, headers={"Origin": origin}), 403)["code"] == "bad_origin"
    for scheme, status in (("https", 403), ("http", 200)):
        assert client.post(PATH, json=ask, headers={"Origin": f"{scheme}://127.0.0.1"}).status_code == status
    behind = {"Origin": "https://127.0.0.1", "X-Forwarded-Proto": "https"}
    assert client.post(PATH, json=ask, headers=behind).status_code == 200, "TLS is the business of a proxy"
    own = client.post(PATH, json=ask, headers={"Origin": "http://127.0.0.1"})
    assert own.status_code == 200
    assert not [name for name in own.headers if name.lower().startswith("access-control")]
    asked = client.options(PATH, headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"})
    assert error(asked, 403)


def test_no_page_of_documentation_but_a_schema(client: TestClient) -> None:
    assert error(client.get("/docs"), 404)["message"] == "no such route: GET /docs"
    assert client.get("/openapi.json").json()["info"]["title"] == "upslope"
    assert error(client.get(PATH), 405)["message"] == f"{PATH} does not answer GET"


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large(guarded: TestClient, declared: bool) -> None:
    body = json.dumps({"prompt": "x" * 2000}).encode()
    content: Any = body if declared else (part for part in (body[:1000], body[1000:]))
    headers = {"Authorization": f"Bearer {KEY}".encode(), "Content-Type": "application/json"}
    found = error(guarded.post(PATH, content=content, headers=headers), 413)
    assert found["message"].startswith("the body has more than the 1048 bytes")


def test_a_prompt_of_ten_megabytes_over_a_socket(live: Live) -> None:
    body = json.dumps({"prompt": "x" * 10_000_000}).encode()
    for content in (body, (body[i : i + 65536] for i in range(0, len(body), 65536))):
        answer = httpx.post(live.url + PATH, content=content, headers={"Content-Type": "application/json"})
        error(answer, 413)
    with closing(http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=30)) as claiming:
        claiming.putrequest("POST", PATH)
        claiming.putheader("Content-Length", str(10**12))
        claiming.endheaders(b"{")
        assert claiming.getresponse().status == 413, "nobody waits for the rest"


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "not valid JSON"),
        (b"", 400, "the body: Field required"),
        (b"[]", 400, "the body"),
        (b"null", 400, "the body"),
        (b'"text"', 400, "the body"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "NaN is no number in JSON"),
        (b'{"prompt": "a", "temperature": Infinity}', 400, "Infinity is no number"),
        (b'{"prompt": "a", "temperature": -Infinity}', 400, "-Infinity is no number"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
        (b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", 400, "temperature"),
        (b'{"prompt": "a", "temperature": 1' + b"0" * 5000 + b"}", 400, "digits"),
        (b'{"prompt": "\xff\xfe"}', 400, "not valid UTF-8: invalid start byte at byte 12"),
        (b'{"prompt": "\\ud800"}', 400, "half of a surrogate pair"),
        (b'{"\\udc00": 1}', 400, "half of a surrogate pair"),
        (b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", 400, "nested too deeply"),
        ("\ufeff{}".encode(), 400, "not valid JSON"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_bodies_that_are_no_json(client: TestClient, body: bytes, status: int, says: str) -> None:
    answer = client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert says in error(answer, status)["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_bodies_of_another_type(client: TestClient, kind: str | None) -> None:
    answer = client.post(PATH, content=b'{"prompt": "a"}', headers={} if kind is None else {"Content-Type": kind})
    assert "send application/json" in error(answer, 415)["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"audio": {"format": "wav"}}, "audio"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-9}, None),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -5}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"n": True}, "n"),
        ({"best_of": 1, "n": 2}, None),
        ({"best_of": 2, "stream": True}, None),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, None),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [258]}, "stop_token_ids"),
        ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream": False, "stream_options": {"include_usage": True}}, None),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options"),
        ({"stream": True, "echo": True, "logprobs": 1}, None),
        ({"length_penalty": 2}, None),
        ({"use_beam_search": True}, "best_of"),
        ({"use_beam_search": True, "best_of": 3, "top_k": 2}, "top_k"),
        ({"use_beam_search": True, "best_of": 3, "logprobs": 1}, "logprobs"),
        ({"use_beam_search": True, "best_of": 3, "stop": "a"}, "stop"),
        ({"prompt": ""}, None),
        ({"prompt": []}, None),
        ({"prompt": [[]]}, None),
        ({"prompt": ["", "a"]}, None),
        ({"prompt": [5, "a"]}, "prompt"),
        ({"prompt": [-5]}, "prompt"),
        ({"prompt": [258]}, None),
        ({"prompt": [2**40]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 1000}, "prompt"),
        ({"model": 5}, "model"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_fields_that_make_no_sense(client: TestClient, fields: dict[str, Any], param: str | None) -> None:
    for streamed in (False, True):
        body = {"prompt": "abc", "max_tokens": 2, "stream": streamed, **fields}
        assert error(client.post(PATH, json=body), 400)["param"] == param
    assert client.get("/health").status_code == 200


def test_an_unsupported_field_is_named(client: TestClient) -> None:
    found = error(client.post(PATH, json={"prompt": "a", "suffix": "b"}), 400)
    assert found["message"] == "suffix: this field is not supported; leave it out"
    assert found["code"] == "unsupported_field"
    nothing = client.post(PATH, json={"prompt": "a", "max_tokens": 1, "suffix": None, "stop": None, "seed": None})
    assert nothing.status_code == 200, "null means that a field was not given"


def test_an_unknown_model(client: TestClient) -> None:
    for answer in (client.post(PATH, json={"prompt": "a", "model": "gpt"}), client.get("/v1/models/gpt/4")):
        found = error(answer, 404)
        assert found["code"] == "model_not_found"
        assert found["message"].endswith("is served here, only tiny")


@pytest.mark.parametrize(
    "fields", [{"prompt": "x" * 600}, {"prompt": "x" * 512}, {"prompt": "x" * 500, "max_tokens": 13}]
)
def test_what_does_not_fit_the_context(client: TestClient, fields: dict[str, Any]) -> None:
    found = error(client.post(PATH, json=fields), 400)
    assert found["code"] == "context_length_exceeded"
    assert "holds 512 tokens" in found["message"]
    assert client.post(PATH, json={"prompt": "x" * 500, "max_tokens": 12}).status_code == 200


def test_a_cache_smaller_than_the_context_is_the_context(model_folder: Path) -> None:
    app = create_app({NAME: make_service(model_folder, num_blocks=2)}, ServeOptions())
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 128
        found = error(client.post(PATH, json={"prompt": "x" * 120, "max_tokens": 10}), 400)
        assert found["code"] == "context_length_exceeded"
        fits = client.post(PATH, json={"prompt": "x" * 120, "max_tokens": 8, "ignore_eos": True})
        assert fits.json()["usage"]["completion_tokens"] == 8


def test_a_full_queue_says_when_to_come_back(model_folder: Path) -> None:
    """One request runs, one waits, and the third is told to come back."""
    service = make_service(model_folder, max_batch=1, max_queue=1)
    service.start()
    transport = httpx.ASGITransport(create_app({NAME: service}, ServeOptions()))

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            async with Gate(service):
                ask = {"prompt": "abc", "max_tokens": 2}
                answers = [asyncio.ensure_future(client.post(PATH, json=ask)) for _ in range(3)]
                while service._thread._work_queue.qsize() < 3:
                    await asyncio.sleep(0)
            found = await asyncio.gather(*answers)
        await service.stop()
        return found

    found = asyncio.run(main())
    assert [answer.status_code for answer in found] == [200, 200, 429]
    assert found[2].headers["Retry-After"] == "1"
    assert error(found[2], 429)["type"] == "rate_limit_error"


def test_a_server_that_drains_takes_nothing_new(client: TestClient) -> None:
    client.app.state.draining = True
    answer = client.post(PATH, json={"prompt": "abc"})
    assert error(answer, 503)["code"] == "shutting_down"
    assert answer.headers["Retry-After"] == "1"
    assert client.get("/health").json()["status"] == "draining"
    assert client.get("/metrics").status_code == 200


def test_the_loop_goes_on_while_a_long_text_is_tokenised(client: TestClient) -> None:
    """A text longer than the context costs a thread, not the event loop; it is refused all the same."""
    found = error(client.post(PATH, json={"prompt": "ab " * 300_000}), 400)
    assert found["code"] == "context_length_exceeded"


def test_services_stop_with_the_application(model_folder: Path) -> None:
    service = make_service(model_folder)
    with TestClient(create_app({NAME: service}, ServeOptions()), base_url="http://127.0.0.1"):
        assert service.healthy
    assert not service.healthy
    asyncio.run(service.stop())
