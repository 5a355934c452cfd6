"""The chat page's files and routes over HTTP: what is served, under which rules, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from upslope.data.records import read_records
from upslope.options import ServeOptions
from upslope.serving.page import SECURITY_HEADERS, STATIC
from upslope.serving.server import create_app

FILES = sorted(path.name for path in STATIC.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]
THUMB: dict[str, Any] = {
    "id": "n1",
    "messages": [{"role": "user", "content": "2 + 2?"}],
    "reply": "4",
    "label": True,
    "model": "tiny",
    "weight_version": 0,
}
VOTE: dict[str, Any] = {
    "id": "v1",
    "messages": THUMB["messages"],
    "a": {"model": "tiny", "reply": "4"},
    "b": {"model": "other", "reply": "5"},
    "winner": "a",
}


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    """The real application around a model that is never asked."""
    services: Any = {"tiny": SimpleNamespace(source="runs/tiny")}
    return create_app(services, ServeOptions(feedback=str(tmp_path / "feedback")))


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1")


def text(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def test_the_page_comes_with_a_policy_that_runs_its_own_scripts_only(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    directives = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert directives["default-src"] == directives["base-uri"] == directives["form-action"] == "'none'"
    assert directives["frame-ancestors"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served_as_what_it_is(client: TestClient, name: str) -> None:
    answer = client.get(f"/static/{name}")
    kind = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.status_code == 200
    assert answer.headers["content-type"].split(";")[0] == kind[name.rsplit(".")[-1]]
    assert answer.content == (STATIC / name).read_bytes()
    assert all(answer.headers[key] == value for key, value in SECURITY_HEADERS.items())


def test_a_file_known_already_is_not_sent_again(client: TestClient) -> None:
    tag = client.get("/static/app.js").headers["etag"]
    assert client.get("/static/app.js", headers={"If-None-Match": tag}).status_code == 304
    assert client.get("/static/app.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("name", ["../page.py", "%2e%2e%2fpage.py", "..%5cpage.py", "/etc/passwd", "%00", ""])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    answer = client.get(f"/static/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for name in FILES:
        found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", re.sub(r"^\s*//.*$", "", text(name), flags=re.M))
        assert set(found) <= {"http://www.w3.org/2000/svg"}, name


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_parses_text_as_html_or_code(name: str) -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc"
    forbidden += r"|setHTML|\beval\(|new Function|javascript:|setTimeout\([\"'`]"
    assert not re.search(forbidden, text(name))


def test_the_page_has_nothing_inline_and_every_name_it_uses() -> None:
    html = text("index.html")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    named = set(re.findall(r'(?:href|src)="static/([^"]+)"', html))
    assert named <= set(FILES)
    symbols = set(re.findall(r'<symbol id="i-(\w+)"', html))
    assert set(re.findall(r'data-icon="(\w+)"', html)) <= symbols
    for name in SCRIPTS:
        assert {f"./{file}" for file in FILES} >= set(re.findall(r'from "([^"]+)"', text(name)))
        assert symbols >= set(re.findall(r'icon(?:Button)?\("(\w+)"', text(name)))


def test_both_languages_have_every_word() -> None:
    tables = re.findall(r"^const (ENGLISH|CHINESE) = \{\n(.*?)^\};", text("strings.js"), flags=re.M | re.S)
    english, chinese = (dict(re.findall(r'^  (\w+): "(.*)",$', body, flags=re.M)) for _, body in tables)
    assert english.keys() == chinese.keys()
    assert len(english) > 80
    for key in english:
        assert set(re.findall(r"\{\w+\}", english[key])) == set(re.findall(r"\{\w+\}", chinese[key])), key
    used = set(re.findall(r'data-t(?:-label|-placeholder)?="(\w+)"', text("index.html")))
    for name in SCRIPTS:
        used |= set(re.findall(r'\bt\("(\w+)"', text(name)))
    assert used <= english.keys()


def test_a_thumb_is_saved(client: TestClient, app: FastAPI) -> None:
    assert client.post("/feedback/thumb", json=THUMB).json() == {"saved": True}
    folder = Path(app.state.settings.feedback)
    assert read_records(folder / "labels.jsonl")[0].label is True
    answer = client.get("/feedback").json()
    assert answer["rows"] == {"sft": 1, "preferences": 0, "labels": 1, "votes": 0}
    assert answer["folder"] == str(folder)


def test_an_edit_is_saved(client: TestClient, app: FastAPI) -> None:
    body = {key: THUMB[key] for key in ("id", "messages", "model")} | {"original": "5", "edited": "4"}
    assert client.post("/feedback/edit", json=body).status_code == 200
    assert read_records(Path(app.state.settings.feedback) / "preferences.jsonl")[0].kind == "preference"


def test_a_vote_is_for_served_models_and_answers_with_the_tally(client: TestClient, app: FastAPI) -> None:
    refused = client.post("/feedback/vote", json=VOTE)
    assert refused.status_code == 404
    assert "'other'" in refused.json()["error"]["message"]
    app.state.services["other"] = SimpleNamespace(source="runs/other")
    answer = client.post("/feedback/vote", json=VOTE)
    assert answer.json()["tally"] == [{"models": ["other", "tiny"], "wins": [0, 1], "ties": 0}]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reply": ""}, "reply is empty"),
        ({"surprise": 1}, "surprise: this field is not supported"),
        ({"messages": "x"}, "messages"),
        ({"label": "true"}, "label"),
        ({"id": "a b"}, "id"),
    ],
)
def test_a_wrong_body_is_refused_by_name(client: TestClient, app: FastAPI, change: dict[str, Any], said: str) -> None:
    answer = client.post("/feedback/thumb", json=THUMB | change)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert not Path(app.state.settings.feedback).exists()


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"Content-Type": "text/plain"}, json.dumps(THUMB), 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, json.dumps(THUMB), 415),
        ({"Content-Type": "application/json", "Origin": "https://elsewhere.example"}, json.dumps(THUMB), 403),
        ({"Content-Type": "application/json", "Origin": "null"}, json.dumps(THUMB), 403),
        ({"Content-Type": "application/json", "Host": "elsewhere.example"}, json.dumps(THUMB), 403),
        ({"Content-Type": "application/json"}, json.dumps(THUMB | {"reply": "\ud800"}), 400),
        ({"Content-Type": "application/json"}, "{", 400),
    ],
)
def test_what_another_site_could_send_saves_nothing(
    client: TestClient, app: FastAPI, headers: dict[str, str], content: str, status: int
) -> None:
    answer = client.post("/feedback/thumb", headers=headers, content=content)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert not Path(app.state.settings.feedback).exists()


def test_a_folder_that_cannot_be_written_is_said(client: TestClient, app: FastAPI) -> None:
    Path(app.state.settings.feedback).write_text("a file is in the way")
    answer = client.post("/feedback/thumb", json=THUMB)
    assert answer.status_code == 500
    assert "cannot be saved" in answer.json()["error"]["message"]
