"""A tiny model as a service, as an application, behind a client in this process, and behind a port."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from tiny_model import tiny_folder

from upslope.build import load_inference
from upslope.engine import Engine
from upslope.options import ServeOptions
from upslope.serving.server import create_app
from upslope.serving.service import Service

NAME = "tiny"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model: 258 tokens (one per byte, <|im_start|> 0, <|im_end|> 1), a context of 512."""
    return tiny_folder(tmp_path_factory.mktemp("serving") / "tiny")


def make_service(folder: Path, name: str = NAME, *, max_queue: int = 256, **engine: Any) -> Service:
    """A service over a folder in float32, not started."""
    policy = load_inference(folder, dtype="float32")
    made = Engine(policy.model, policy.tokenizer, eos_token_ids=policy.eos_token_ids, **{"num_blocks": 256, **engine})
    load = lambda source: load_inference(source, dtype="float32")  # noqa: E731
    return Service(name, made, policy.tokenizer, source=str(folder), load=load, max_queue=max_queue)


@pytest.fixture
def service(model_folder: Path) -> Iterator[Service]:
    """A started service."""
    made = make_service(model_folder)
    made.start()
    yield made
    asyncio.run(made.stop())


@pytest.fixture
def app(model_folder: Path, tmp_path: Path) -> FastAPI:
    """The application over the tiny model, feedback going to a temporary folder; a client starts and stops it."""
    return create_app({NAME: make_service(model_folder)}, ServeOptions(feedback=str(tmp_path / "feedback")))


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    """Requests to the application, in this process."""
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


class Gate:
    """Holds the engine's thread between two steps, so that what is sent meanwhile arrives all at once."""

    def __init__(self, service: Service) -> None:
        self._open, self._service = threading.Event(), service

    async def __aenter__(self) -> Gate:
        self._call = asyncio.ensure_future(self._service.call(self._open.wait))
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._open.set()
        await self._call


class Live:
    """An application on a free port of loopback, on a thread."""

    def __init__(self, app: FastAPI) -> None:
        import uvicorn

        self.app = app
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> Live:
        self._thread.start()  # the socket listens already: a client waits in its queue until the server is up
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server did not stop"


@pytest.fixture
def live(app: FastAPI) -> Iterator[Live]:
    """The application behind a port: `live.url`."""
    with Live(app) as running:
        yield running


@pytest.fixture
def serve() -> Iterator[Callable[[FastAPI], Live]]:
    """Puts any application behind a port until the test ends."""
    running: list[Live] = []

    def start(app: FastAPI) -> Live:
        running.append(Live(app).__enter__())
        return running[-1]

    yield start
    for one in running:
        one.__exit__()
