"""A server for the chat page whose replies a test writes: the page's own routes, and a chat API that says as told."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from upslope.options import ServeOptions
from upslope.serving import errors, page
from upslope.serving.errors import ApiError


@dataclass
class Said:
    """One reply: its tokens (text, or bytes that are part of a character) with their probabilities.

    `holds`: after these many tokens the reply waits for `FakeChat.go_on`. `error`: what it ends with instead.
    """

    tokens: Sequence[str | bytes]
    probabilities: Sequence[float] = ()
    others: dict[int, Sequence[tuple[str, float]]] = field(default_factory=dict)
    holds: int | None = None
    finish: str = "stop"
    error: ApiError | None = None


class FakeChat:
    """The application (`app`), what it was asked (`asked`), whether a client broke a reply off (`broken_off`)."""

    def __init__(self, feedback: Path, models: Sequence[str] = ("uphill-135m",), key: str | None = None) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self.replies: list[Said] = []
        self.asked: list[dict[str, Any]] = []
        self.broken_off = threading.Event()
        self.key = key
        self.versions = dict.fromkeys(models, 0)
        self._go = asyncio.Event()
        self.app = app = FastAPI()
        app.state.settings = ServeOptions(feedback=str(feedback))
        app.state.services = {name: SimpleNamespace(source=f"runs/{name}") for name in models}
        errors.install(app)
        app.include_router(page.router)
        app.get("/v1/models")(self.models)
        app.post("/v1/chat/completions")(self.chat)

    def go_on(self) -> None:
        """Let a held reply continue; called from the test's thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._go.set)

    async def models(self, request: Request) -> JSONResponse:
        self.check(request)
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.versions]})

    async def chat(self, request: Request) -> StreamingResponse:
        self.check(request)
        self._loop = asyncio.get_running_loop()
        body = await request.json()
        self.asked.append(body)
        said = self.replies.pop(0)
        if said.error is not None and not said.tokens:
            raise said.error
        version = self.versions[body["model"]]
        headers = {"X-Weight-Version": str(version)}
        events = self.events(said, body, f"{body['model']}@{version}")
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    def check(self, request: Request) -> None:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            raise ApiError(401, "wrong API key", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def events(self, said: Said, body: dict[str, Any], fingerprint: str) -> AsyncIterator[str]:
        def event(**fields: Any) -> str:
            return f"data: {json.dumps({'system_fingerprint': fingerprint, **fields})}\n\n"

        def choice(content: str, entry: dict[str, Any] | None, finish: str | None = None) -> dict[str, Any]:
            logprobs = {"content": [entry]} if entry and body.get("logprobs") else None
            return {"index": 0, "delta": {"content": content}, "logprobs": logprobs, "finish_reason": finish}

        try:
            pending = b""
            for i, token in enumerate(said.tokens):
                if said.holds == i:
                    await self._go.wait()
                pending += token if isinstance(token, bytes) else token.encode()
                try:
                    text, pending = pending.decode(), b""
                except UnicodeDecodeError:
                    text = ""
                yield event(choices=[choice(text, entry_of(said, i))])
            if said.error is not None:
                yield event(**said.error.body)
            else:
                yield event(choices=[choice("", None, said.finish)])
                yield event(choices=[], usage={"completion_tokens": len(said.tokens)})
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.broken_off.set()
            raise


def entry_of(said: Said, i: int) -> dict[str, Any]:
    token = said.tokens[i]
    raw = token if isinstance(token, bytes) else token.encode()
    name = raw.decode(errors="replace")
    probability = said.probabilities[i] if said.probabilities else 0.9
    tops = said.others.get(i, ((name, probability),))
    return {
        "token": name,
        "bytes": list(raw),
        "logprob": math.log(probability),
        "top_logprobs": [{"token": t, "bytes": list(t.encode()), "logprob": math.log(p)} for t, p in tops],
    }


def said(text: str, **options: Any) -> Said:
    """A reply in tokens of up to seven characters."""
    return Said([text[i : i + 7] for i in range(0, len(text), 7)], **options)
