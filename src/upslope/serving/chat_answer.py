"""The assistant's turn as the protocol writes it: whole, or in chunks as it comes."""

from collections.abc import Iterator, Sequence
from typing import Any

from upslope.data.messages import ToolCall, ToolReader, calls_in
from upslope.engine import Event
from upslope.serving.answers import LEAST_LOGPROB, Answer, Write
from upslope.serving.chat_bodies import ChatBody
from upslope.types import Completion


class ChatAnswer(Answer[ChatBody]):
    """The answer to a conversation."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, found: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """The body of an answer that is not streamed; with the conversation's tokens where they are asked for."""
        return super().whole(found) | ({"prompt_token_ids": self.prompts[0]} if self.body.return_token_ids else {})

    def chunk(self, choices: list[dict[str, Any]], counts: dict[str, int] | None = None) -> dict[str, Any]:
        """The body of one event; of the first of each choice with the conversation's tokens."""
        begins = self.body.return_token_ids and any("role" in choice["delta"] for choice in choices)
        return super().chunk(choices, counts) | ({"prompt_token_ids": self.prompts[0]} if begins else {})

    def choice(self, place: int, completion: Completion) -> dict[str, Any]:
        """A reply, without its index."""
        shown, calls = calls_in(completion.text) if self.body.offers_tools else (completion.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": shown, "refusal": None}
        if calls:
            message |= {"content": shown or None, "tool_calls": [_call(call) for call in calls]}
        choice: dict[str, Any] = {"message": message, "logprobs": None}
        choice["finish_reason"] = _reason(completion, called=bool(calls))
        if self.body.logprobs:
            rows = zip(completion.tokens, completion.policy_logprobs, completion.top_logprobs or [], strict=True)
            choice["logprobs"] = {"content": [self.entry(*row) for row in rows], "refusal": None}
        if self.body.return_token_ids:
            choice["token_ids"] = completion.tokens
        return choice

    def writer(self, place: int, index: int) -> Write:
        """A chunk that says who speaks, then one per piece of text or call, then why the reply ends."""
        return _Writer(self, index).write

    def entry(self, token: int, logprob: float, top: dict[int, float]) -> dict[str, Any]:
        """One token's log-prob with the likeliest alternatives, in nats of the policy at the request's temperature."""
        likeliest = list(top.items())[: self.body.top_logprobs or 0]
        return {**self._named(token, logprob), "top_logprobs": [self._named(*one) for one in likeliest]}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        pieces = self.service.pieces
        return {"token": pieces.text(token), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(pieces.raw(token))}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _reason(completion: Completion, *, called: bool) -> str:
    """ "tool_calls" where the turn ended with calls; what the token budget cut is "length" all the same."""
    return "tool_calls" if called and completion.finish_reason == "stop" else completion.finish_reason


class _Writer:
    """One choice of a streamed answer; log-probs of tokens whose text is held back wait for it."""

    def __init__(self, answer: ChatAnswer, index: int) -> None:
        self._answer, self._index = answer, index
        self._reader = ToolReader() if answer.body.offers_tools else None
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
        if self._answer.body.logprobs and event.token is not None:
            assert event.policy_logprob is not None
            self._entries.append(self._answer.entry(event.token, event.policy_logprob, event.top_logprobs or {}))
        if self._answer.body.return_token_ids:
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
