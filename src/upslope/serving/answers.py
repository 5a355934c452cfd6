"""What completions and chat have in common: a request is put to the engine, and answered whole or as it comes."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Generic, TypeVar

from fastapi import Request, Response

from upslope.engine import Event, TokenMask
from upslope.serving.access import event, event_stream, reply, while_connected
from upslope.serving.sampling import SamplingBody, best
from upslope.serving.service import Service
from upslope.serving.stream import Stream, merged
from upslope.types import Completion, SamplingParams

B = TypeVar("B", bound=SamplingBody)
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have
Write = Callable[[Event], Iterator[dict[str, Any]]]
"""Event of a sample -> the choice objects that it leads to; none where there is nothing to tell yet."""


class Answer(ABC, Generic[B]):
    """A request that has been understood: what the engine is given (one request of it per prompt), how it is answered.

    prefix: of the answer's id. kind, chunk_kind: the `object` of an answer, and of a part of a streamed one.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    mask: TokenMask | None = None

    def __init__(self, service: Service, body: B, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        self.service, self.body, self.prompts, self.params = service, body, prompts, params
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    @abstractmethod
    def choice(self, place: int, completion: Completion) -> dict[str, Any]:
        """A choice of the answer to the prompt at `place`, without its index."""

    @abstractmethod
    def writer(self, place: int, index: int) -> Write:
        """What writes the choice of that index, an answer to the prompt at `place`, as it comes."""

    async def respond(self, request: Request) -> Response:
        """Ask the engine, and answer."""
        if self.body.stream:
            streams = await self._submit()
            return event_stream(self.service, self._chunks(streams), *streams)
        found = await while_connected(request, self._completions())
        every = [completion for completions in found for completion in completions]
        return reply(self.service, self.whole(found), version=min(c.version for c in every))

    def whole(self, found: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """The body of an answer that is not streamed, from the completions of every prompt."""
        choices = [self.choice(place, c) for place, some in enumerate(found) for c in best(some, self.body.n)]
        answer = self._head(self.kind)
        answer["choices"] = [{"index": index, **choice} for index, choice in enumerate(choices)]
        answer["usage"] = self._usage(sum(len(c.tokens) for completions in found for c in completions))
        return answer

    def chunk(self, choices: list[dict[str, Any]], counts: dict[str, int] | None = None) -> dict[str, Any]:
        """The body of one event of a streamed answer."""
        fields = {"system_fingerprint": self.service.fingerprint, "choices": choices}
        return self._head(self.chunk_kind) | fields | ({"usage": counts} if self.body.wants_usage else {})

    async def _submit(self) -> list[Stream]:
        """With a seed a prompt's text does not depend on its place in the list."""
        keys = range(len(self.prompts)) if self.body.seed is None else [0] * len(self.prompts)
        options = {"token_mask": self.mask, "stream": self.body.stream}
        asked = zip(self.prompts, keys, strict=True)
        return await self.service.submit_all(
            [self.service.submit(prompt, self.params, key=key, **options) for prompt, key in asked]
        )

    async def _completions(self) -> list[list[Completion]]:
        streams = await self._submit()
        try:
            return [await stream.completions() for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()

    async def _chunks(self, streams: Sequence[Stream]) -> AsyncGenerator[str, None]:
        """The server-sent events, [DONE] excepted; at the end, where it is asked for, the counts of tokens."""
        writers: dict[int, Write] = {}
        drawn = 0
        async with aclosing(merged(streams)) as arriving:
            async for place, happened in arriving:
                index = place * self.body.n + happened.sample
                if index not in writers:
                    writers[index] = self.writer(place, index)
                for choice in writers[index](happened):
                    yield event(self.chunk([choice]))
                if happened.completion is not None:
                    drawn += len(happened.completion.tokens)
        if self.body.wants_usage:
            yield event(self.chunk([], self._usage(drawn)))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.service.name}

    def _usage(self, drawn: int) -> dict[str, int]:
        """The counts; everything that was drawn counts, the token that ended a text too."""
        given = sum(map(len, self.prompts))
        return {"prompt_tokens": given, "completion_tokens": drawn, "total_tokens": given + drawn}
