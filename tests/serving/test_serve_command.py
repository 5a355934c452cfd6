"""`upslope serve` from the outside: the line that says where, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from upslope import cli
from upslope.build import load_inference
from upslope.commands.serve import _names
from upslope.errors import ConfigError, RunError
from upslope.options import ServeOptions
from upslope.serving.server import bind, create_app, serve, url_of

from .conftest import NAME, make_service

PATH = "/v1/completions"
ENDLESS = {"prompt": "abc", "max_tokens": 500, "ignore_eos": True, "stream": True}


def test_from_the_command_line_to_sigterm(model_folder: Path, root: Path) -> None:
    """Two models, one line on standard output with a free port; requests; SIGTERM; exit code 0."""
    arguments = ["serve", str(model_folder), "--served-model-name", "mine", "--compare", str(model_folder)]
    arguments += ["--port", "0", "--max-batch", "4"]
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    with subprocess.Popen(
        [sys.executable, "-m", "upslope", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("upslope: serving mine and tiny at http://127.0.0.1:"), line
            url = line.split()[-1]
            for name in ("mine", "tiny"):
                found = httpx.post(url + PATH, json={"model": name, "prompt": "abc", "max_tokens": 3}, timeout=60)
                assert found.json()["model"] == name
            process.send_signal(signal.SIGTERM)
            rest, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, log
    assert rest == ""
    assert f"upslope: mine: loading {model_folder}" in log
    assert "Traceback" not in log


class Running:
    """What a test does on a thread beside `serve`, which wants the main thread for its signals."""

    def __init__(self, folder: Path, drain_seconds: float, script: Callable[[str, Running], None]) -> None:
        self.settings = ServeOptions(drain_seconds=drain_seconds)
        self.service = make_service(folder)
        self.app = create_app({NAME: self.service}, self.settings)
        self.step = self.service.engine.step
        self.error: BaseException | None = None
        self._script = script
        self._ended = threading.Event()

    def serve(self) -> int:
        """The exit code, after the script has run to its end without an error."""
        threads: list[threading.Thread] = []

        def ready(url: str) -> None:
            threads.append(threading.Thread(target=self._follow, args=[url], daemon=True))
            threads[0].start()

        with bind("127.0.0.1", 0) as bound:
            code = serve(self.app, bound, self.settings, ready)
        self._ended.set()
        threads[0].join(60)
        if self.error is not None:
            raise self.error
        return code

    def _follow(self, url: str) -> None:
        try:
            self._script(url, self)
        except BaseException as error:
            self.error = error
            self.app.state.draining = True
            if not self._ended.is_set():  # afterwards a signal is for the test runner
                self.signal()

    def signal(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_lets_running_requests_finish(model_folder: Path) -> None:
    def script(url: str, server: Running) -> None:
        with httpx.stream("POST", url + PATH, json={**ENDLESS, "max_tokens": 120}, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.service.engine.step = held(server)
            server.signal()
            assert server.draining.wait(30)
            refused = httpx.post(url + PATH, json={"prompt": "abc"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert httpx.get(url + "/health").status_code == 503
            server.opened.set()
            chunks = [line.removeprefix("data: ") for line in lines if line]
        assert chunks[-1] == "[DONE]"
        assert json.loads(chunks[-2])["choices"][0]["finish_reason"] == "length"

    assert Running(model_folder, 60, script).serve() == 0


def held(server: Running) -> Callable[[], Any]:
    """The engine's step, which waits until the test has looked at the server that drains."""
    server.opened, server.draining = threading.Event(), threading.Event()
    stop = server.service.stop

    async def stopping(drain_seconds: float = 0.0) -> None:
        server.draining.set()
        await stop(drain_seconds)

    server.service.stop = stopping

    def step() -> Any:
        assert server.opened.wait(30)
        return server.step()

    return step


@pytest.mark.parametrize(("drain_seconds", "signals", "code"), [(0.0, 1, 0), (600.0, 2, 130)])
def test_what_does_not_finish_in_time_is_ended(
    model_folder: Path, drain_seconds: float, signals: int, code: int
) -> None:
    """After the time for draining, or at a second signal; the client is told, or its connection ends."""

    def script(url: str, server: Running) -> None:
        try:
            with httpx.stream("POST", url + PATH, json={**ENDLESS, "n": 64}, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                server.signal()
                if signals == 2:
                    while not server.app.state.draining:
                        next(lines)
                    server.signal()
                rest = [line.removeprefix("data: ") for line in lines if line]
            assert json.loads(rest[-2])["error"]["code"] == "shutting_down"
        except httpx.HTTPError:
            assert signals == 2

    server = Running(model_folder, drain_seconds, script)
    assert server.serve() == code
    assert not server.service.healthy


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RunError, match=f"cannot listen on 127.0.0.1:{port}: .*in use; choose another --port"):
            bind("127.0.0.1", port)
        assert cli.main(["serve", "no-such/model", "--port", str(port)]) == 5
    assert "choose another --port" in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "./no/such/model", "--port", "0"]) == 4
    assert "./no/such/model: no such folder" in capsys.readouterr().err


def test_an_open_address_without_a_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UPSLOPE_API_KEY", raising=False)
    assert cli.main(["serve", "--host", "0.0.0.0"]) == 2
    assert "set --api-key" in capsys.readouterr().err


def test_models_are_loaded_on_threads_that_end(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes and lives on makes the engine's thread slower (upslope.devices.hardware)."""
    threads = []

    def load(*arguments: Any, **named: Any) -> Any:
        threads.append(threading.current_thread())
        return load_inference(*arguments, **named)

    def serve(app: Any, *_: Any) -> int:
        async def swap() -> None:
            service = app.state.services["tiny"]
            service.start()
            await service.swap(str(model_folder))
            await service.stop()

        asyncio.run(swap())
        return 0

    monkeypatch.setattr("upslope.build.load_inference", load)
    monkeypatch.setattr("upslope.serving.server.serve", serve)
    assert cli.main(["serve", str(model_folder), "--port", "0"]) == 0
    assert len(threads) == 2, "at the start, and for the swap"
    assert not any(thread.is_alive() for thread in threads)


def test_addresses() -> None:
    with bind("::1", 0) as bound:
        assert url_of(bound) == f"http://[::1]:{bound.getsockname()[1]}"
    with pytest.raises(RunError, match=r"cannot listen on 192\.0\.2\.1:0"):
        bind("192.0.2.1", 0)  # of the block for documentation: no machine has it


def test_names(tmp_path: Path) -> None:
    assert _names([str(tmp_path)], None) == [tmp_path.name]
    assert _names(["Qwen/Qwen3-0.6B", "models/a.gguf"], None) == ["Qwen/Qwen3-0.6B", "a"]
    assert _names(["smollm2-135m"], "mine") == ["mine"]
    with pytest.raises(ConfigError, match="--served-model-name"):
        _names(["smollm2-135m", "smollm2-135m"], None)


def test_the_options_reach_the_engine_and_its_queue(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of 64 tokens has two layers' keys and values of two heads of width 8, in two bytes each."""
    served: list[Any] = []
    monkeypatch.setattr("upslope.serving.server.serve", lambda app, *_: served.append(app) or 0)
    sizes = ["--max-batch", "3", "--max-queue", "5", "--dtype", "bfloat16", "--kv-cache-gb", str(7.5 * 8192 / 2**30)]
    assert cli.main(["serve", str(model_folder), "--port", "0", "--served-model-name", "mine", *sizes]) == 0
    (service,) = served[0].state.services.values()
    engine = service.engine
    assert (service.name, service.max_queue, service.capacity) == ("mine", 5, 8)
    assert (engine.scheduler.max_batch, engine.pool.num_blocks) == (3, 7)
    assert engine.model.dtype == torch.bfloat16
    assert service.max_positions == 7 * 64
