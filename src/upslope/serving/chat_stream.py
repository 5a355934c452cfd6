"""The assistant's turn as the protocol writes it: whole, or in chunks as it comes."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from upslope.engine import Event
from upslope.serving.access import event as sent
from upslope.serving.access import usage
from upslope.serving.chat_bodies import ChatBody
from upslope.serving.completions import LEAST_LOGPROB
from upslope.serving.constraints import Constraint
from upslope.serving.pieces import Pieces
from upslope.serving.sampling import best
from upslope.serving.service import Service, Stream
from upslope.serving.tools import ToolCall, ToolReader
from upslope.types import Completion, SamplingParams

__all__ = ["Asked", "chunks", "whole"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has been understood: what the engine is given, and how the answer is to be written."""

    service: Service
    body: ChatBody
    prompt: list[int]
    params: SamplingParams
    constraint: Constraint | None
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that every object of the answer begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.name}

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """The counts; everything that was drawn counts, the token that ended a reply too."""
        return usage(len(self.prompt), completion_tokens)


def whole(asked: Asked, completions: Sequence[Completion]) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    chosen = best(completions, asked.body.n)
    answer = asked.head("chat.completion")
    answer["choices"] = [_choice(asked, i, completion) for i, completion in enumerate(chosen)]
    answer["usage"] = asked.usage(sum(len(completion.tokens) for completion in completions))
    if asked.body.return_token_ids:
        answer["prompt_token_ids"] = asked.prompt
    return answer


def _choice(asked: Asked, index: int, completion: Completion) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
    calls: list[ToolCall] = []
    if asked.body.offers_tools:
        parts = ToolReader().push(completion.text, final=True)
        calls = [part for part in parts if isinstance(part, ToolCall)]
        message["content"] = "".join(part for part in parts if isinstance(part, str))
    if calls:
        message["content"] = message["content"] or None
        message["tool_calls"] = [_call(call) for call in calls]
    choice: dict[str, Any] = {"index": index, "message": message, "logprobs": None}
    choice["finish_reason"] = _reason(completion, called=bool(calls))
    if asked.body.logprobs:
        tops = completion.top_logprobs or []
        rows = zip(completion.tokens, completion.policy_logprobs, tops, strict=True)
        pieces = asked.service.pieces
        choice["logprobs"] = {"content": [_entry(asked, pieces, *row) for row in rows], "refusal": None}
    if asked.body.return_token_ids:
        choice["token_ids"] = completion.tokens
    return choice


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _reason(completion: Completion, *, called: bool) -> str:
    """ "tool_calls" where the turn ended with calls; what the token budget cut is "length" all the same."""
    return "tool_calls" if called and completion.finish_reason == "stop" else completion.finish_reason


def _entry(asked: Asked, pieces: Pieces, token: int, logprob: float, top: dict[int, float]) -> dict[str, Any]:
    """One token's log-prob with the likeliest alternatives, in nats of the policy at the request's temperature."""
    likeliest = list(top.items())[: asked.body.top_logprobs or 0]
    return {**_named(pieces, token, logprob), "top_logprobs": [_named(pieces, *one) for one in likeliest]}


def _named(pieces: Pieces, token: int, logprob: float) -> dict[str, Any]:
    return {"token": pieces.text(token), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(pieces.raw(token))}


async def chunks(asked: Asked, stream: Stream) -> AsyncGenerator[str, None]:
    """The server-sent events of an answer, [DONE] excepted."""
    writers = [_Writer(asked, i) for i in range(asked.body.n)]
    drawn = 0
    async with stream:
        async for event in stream:
            for choice in writers[event.sample].write(event):
                yield _chunk(asked, [choice])
            if event.completion is not None:
                drawn += len(event.completion.tokens)
    if asked.body.wants_usage:
        yield _chunk(asked, [], asked.usage(drawn))


def _chunk(asked: Asked, choices: list[dict[str, Any]], counts: dict[str, int] | None = None) -> str:
    chunk = asked.head("chat.completion.chunk")
    chunk |= {"system_fingerprint": asked.service.fingerprint, "choices": choices}
    if asked.body.wants_usage:
        chunk["usage"] = counts
    if asked.body.return_token_ids and any("role" in choice["delta"] for choice in choices):
        chunk["prompt_token_ids"] = asked.prompt
    return sent(chunk)


class _Writer:
    """One choice of a streamed answer; log-probs of tokens whose text is held back wait for it."""

    def __init__(self, asked: Asked, index: int) -> None:
        self._asked = asked
        self._index = index
        self._reader = ToolReader() if asked.body.offers_tools else None
        self._entries: list[dict[str, Any]] = []
        self._tokens: list[int] = []
        self._drawn = 0

    def write(self, event: Event) -> Iterator[dict[str, Any]]:
        """The choice objects that an event of its sample leads to."""
        if not self._drawn:
            yield self._choice({"role": "assistant", "content": ""})
        self._note(event)
        ended = event.completion is not None
        for delta in self._deltas(event.text, ended):
            yield self._choice(delta)
        if event.completion is not None:
            if self._entries or self._tokens:
                yield self._choice({"content": ""})
            called = self._reader is not None and self._reader.num_calls > 0
            yield self._choice({}, _reason(event.completion, called=called))

    def _note(self, event: Event) -> None:
        drawn = [event.token] if event.completion is None else event.completion.tokens[self._drawn :]
        self._drawn += len(drawn)
        if self._asked.body.logprobs and event.token is not None:
            assert event.policy_logprob is not None
            pieces, top = self._asked.service.pieces, event.top_logprobs or {}
            self._entries.append(_entry(self._asked, pieces, event.token, event.policy_logprob, top))
        if self._asked.body.return_token_ids:
            self._tokens += [token for token in drawn if token is not None]

    def _deltas(self, text: str, ended: bool) -> Iterator[dict[str, Any]]:
        if self._reader is None:
            if text:
                yield {"content": text}
            return
        first = self._reader.num_calls
        for part in self._reader.push(text, final=ended):
            if isinstance(part, str):
                yield {"content": part}
            else:
                yield {"tool_calls": [{"index": first, **_call(part)}]}
                first += 1

    def _choice(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": reason}
        if self._entries:
            choice["logprobs"], self._entries = {"content": self._entries, "refusal": None}, []
        if self._tokens:
            choice["token_ids"], self._tokens = self._tokens, []
        return choice
