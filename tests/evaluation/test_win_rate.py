"""The judge against a local server that answers as told: both orders, ties, retries, refusals, rubbish."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from upslope.errors import ConfigError, DataError, RunError
from upslope.evaluation.preferences import Comparison, PairJudge, win_rate

pytest.importorskip("httpx")

Answer = tuple[int, str, dict[str, str]]


@contextmanager
def served(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server on loopback: answer(body, number of the request) -> status, text, headers; and what it was asked."""
    asked: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                asked.append({**body, "path": self.path, "key": self.headers.get("authorization")})
                number = len(asked)
            status, text, headers = answer(body, number)
            data = text.encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reply(content: Any) -> Answer:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}), {}


def better(body: dict[str, Any]) -> str:
    """The verdict of a judge that counts the letter x."""
    text = body["messages"][1]["content"]
    first, second = text.partition("Answer A:\n")[2].split("\n\nAnswer B:\n")
    return (
        "[[C]]"
        if first.count("x") == second.count("x")
        else "[[A]]"
        if first.count("x") > second.count("x")
        else "[[B]]"
    )


ROWS = [
    Comparison("q1", "xx", "x"),
    Comparison("q2", "x", "xx"),
    Comparison("q3", "x", "x"),
    Comparison("q4", "xxx", ""),
]


def test_a_fair_judge_is_asked_in_both_orders_and_counted() -> None:
    with (
        served(lambda body, _: reply(f"A or B? [[A]] is tempting.\n {better(body)} \n")) as (url, asked),
        PairJudge(url + "/", "gpt", api_key="secret") as judge,
    ):
        figure = win_rate(judge, ROWS, dataset="d")
    assert figure.value == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert (figure.n, figure.dataset, figure.name) == (4, "d", "win_rate")
    assert figure.low < figure.value < figure.high
    detail = dict(figure.detail)
    assert (detail["wins"], detail["ties"], detail["losses"], detail["inconsistent"]) == (2, 1, 1, 0)
    assert (detail["unparsable"], detail["failed"], detail["not_judged"]) == (0, 0, 0)
    assert len(asked) == 8
    assert {a["path"] for a in asked} == {"/v1/chat/completions"}
    assert {a["key"] for a in asked} == {"Bearer secret"}
    texts = [a["messages"][1]["content"] for a in asked if "q1" in a["messages"][1]["content"]]
    assert sorted(t.partition("Answer A:\n")[2] for t in texts) == ["x\n\nAnswer B:\nxx", "xx\n\nAnswer B:\nx"]


def test_a_judge_that_always_says_the_first_is_shown_to() -> None:
    with served(lambda body, _: reply("[[A]]")) as (url, _), PairJudge(url, "gpt") as judge:
        figure = win_rate(judge, ROWS)
    assert figure.value == 0.5
    assert figure.detail["inconsistent"] == 4
    assert figure.detail["ties"] == 4


@pytest.mark.parametrize(
    "content",
    [
        "[[A]] is better",
        "A",
        "[[D]]",
        "[[A]] [[B]]",
        "",
        "Both are good.\n[[A]]\nThank you",
        None,
        ["[[A]]"],
        "[[a]]",
    ],
)
def test_what_is_no_verdict_is_counted_and_not_guessed(content: Any) -> None:
    def answer(body: dict[str, Any], number: int) -> Answer:
        return reply(content) if "q2" in body["messages"][1]["content"] else reply(better(body))

    with served(answer) as (url, _), PairJudge(url, "gpt") as judge:
        figure = win_rate(judge, ROWS)
    assert figure.n == 3
    assert figure.value == pytest.approx(2.5 / 3)
    assert (figure.detail["unparsable"], figure.detail["not_judged"]) == (2, 1)
    assert figure.detail["first_unparsable"]


@pytest.mark.parametrize(
    "text", ["", "<html>", "[]", '{"choices": []}', '{"choices": [{"message": null}]}', "null", "[" * 100_000]
)
def test_rubbish_for_an_answer_is_one_line(text: str) -> None:
    with (
        served(lambda body, _: (200, text, {})) as (url, _),
        PairJudge(url, "gpt") as judge,
        pytest.raises(DataError, match="no usable pair of verdicts for 4 rows; the first: no chat completion") as e,
    ):
        win_rate(judge, ROWS)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 400


def test_passing_troubles_are_tried_again_and_waits_obey_the_server() -> None:
    waits: list[float] = []
    troubles: list[Answer] = [
        (429, "slow down", {"retry-after": "3"}),
        (503, "", {"retry-after": "1e9"}),
        (500, "", {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        (502, "", {"retry-after": "nan"}),
    ]
    with (
        served(lambda body, n: troubles[n - 1] if n <= 4 else reply("[[A]]")) as (url, asked),
        PairJudge(url, "gpt", sleep=waits.append) as judge,
    ):
        assert judge.verdict("q", "a", "b").score == 1.0
    assert waits == [3.0, 60.0, 4.0, 8.0]
    assert len(asked) == 5


def test_a_request_that_never_succeeds_is_counted_and_too_many_stop_the_run() -> None:
    def answer(body: dict[str, Any], number: int) -> Answer:
        return (500, "broken", {}) if "q2" in body["messages"][1]["content"] else reply(better(body))

    with served(answer) as (url, asked), PairJudge(url, "gpt", retries=1, sleep=lambda _: None) as judge:
        figure = win_rate(judge, ROWS)
        assert (figure.n, figure.detail["failed"], figure.detail["not_judged"]) == (3, 2, 1)
        assert "no answer after 2 tries, status 500: broken" in figure.detail["first_failed"]
        asked.clear()
        judge.max_failures, judge.concurrency = 1, 1
        with pytest.raises(RunError, match=r"requests to http.* were lost; first: no answer after 2 tries"):
            win_rate(judge, [ROWS[1]] * 50)
        assert len(asked) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_a_refusal_stops_at_once(status: int) -> None:
    body = '{"error": {"message": "no such\\nmodel"}}'
    with (
        served(lambda *_: (status, body, {})) as (url, _),
        PairJudge(url, "gpt") as judge,
        pytest.raises(RunError, match=rf"answers {status}: .*no such.*check the URL") as e,
    ):
        win_rate(judge, ROWS)
    assert "\n" not in str(e.value)


def test_a_server_that_is_not_there() -> None:
    with served(lambda body, _: reply("")) as (url, _):
        pass
    with (
        PairJudge(url, "gpt", retries=1, max_failures=0, sleep=lambda _: None) as judge,
        pytest.raises(RunError, match="were lost; first: no answer after 2 tries, ConnectError"),
    ):
        win_rate(judge, ROWS)


def test_an_answer_that_trickles_is_waited_for_no_longer_than_said() -> None:
    """Each byte comes in time; the whole would take a minute."""
    listening = socket.create_server(("127.0.0.1", 0))

    def trickle() -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 600\r\n\r\n")
            for _ in range(600):
                connection.sendall(b" ")
                time.sleep(0.1)

    thread = threading.Thread(target=trickle, daemon=True)
    thread.start()
    started = time.monotonic()
    with (
        listening,
        PairJudge(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", "gpt", retries=0, timeout=0.5) as judge,
    ):
        verdict = judge.verdict("q", "a", "b")
    assert (verdict.score, verdict.kind) == (None, "failed")
    assert "not complete after 0.5 s" in verdict.error
    assert time.monotonic() - started < 20
    thread.join(20)


def test_options_and_rows_that_make_no_sense() -> None:
    for url in ("localhost:8000", "http://", "http://a:b", "ftp://a", ""):
        with pytest.raises(ConfigError, match="judge URL"):
            PairJudge(url, "gpt")
    with pytest.raises(ConfigError, match="concurrency is 0; it must be at least 1"):
        PairJudge("http://localhost", "gpt", concurrency=0)
    with PairJudge("http://127.0.0.1:9", "gpt") as judge, pytest.raises(DataError, match="nothing to compare"):
        win_rate(judge, [])
