"""/v1/completions: text after text."""

from collections.abc import Iterator, Sequence
from typing import Any, Self

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from upslope.engine import Event
from upslope.serving.answers import LEAST_LOGPROB, Answer, Write, encode_all, room, sampling_params, service_of
from upslope.serving.bodies import MAX_LOGPROBS, Prompt, SamplingBody
from upslope.serving.errors import ApiError
from upslope.serving.vocabulary import Offsets
from upslope.types import Completion

Row = tuple[int, float | None, dict[int, float] | None]
"""A token, its log-prob and those of the alternatives; the first of a prompt has neither."""
router = APIRouter(tags=["completions"])


class CompletionBody(SamplingBody):
    """/v1/completions."""

    prompt: Prompt
    max_tokens: int = Field(16, ge=0, lt=2**31, description="0 only with echo.")
    echo: bool = Field(False, description="Begin with the prompt; with logprobs, with the prompt's log-probs.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Alternatives listed per token. Log-probs are the policy's at this temperature "
        "(at 1 where it is 0), before penalties, bias and filters.",
    )
    add_special_tokens: bool = Field(True, description="Whether a text gets the BOS that the tokenizer puts there.")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.prompt in ([], [[]]):
            raise ValueError("prompt is an empty list")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0; without echo there is nothing to answer then")
        if self.stream and self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs cannot be streamed; leave out stream")
        return self


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionBody) -> Response:
    """Continue a text, several texts, tokens, or several lists of tokens; each gives `n` choices."""
    service = service_of(request, body.model)
    if body.echo and service.engine.model.whole_prompts:
        raise ApiError(400, "echo: an encoder-decoder's prompt is not the beginning of its text", "echo")
    given: list[Any] = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else body.prompt
    if len(given) > service.capacity:
        raise ApiError(400, f"{len(given)} prompts in one request; at most {service.capacity} are taken", "prompt")
    texts = given if isinstance(given[0], str) else []
    prompts = await encode_all(service, texts, special=body.add_special_tokens) if texts else given
    for prompt in prompts:
        room(service, prompt, body.max_tokens)
    scored = (body.logprobs if body.max_tokens or body.logprobs else 0) if body.echo else None
    params = sampling_params(body, service, max_tokens=body.max_tokens, logprobs=body.logprobs, prompt_logprobs=scored)
    answer = CompletionAnswer(service, body, prompts, params)
    answer.before = [""] * len(prompts)
    if body.echo:
        answer.before = texts or [service.tokenizer.decode(tokens, skip_special_tokens=False) for tokens in prompts]
    return await answer.respond(request)


class CompletionAnswer(Answer[CompletionBody]):
    """before: what the text of the choices begins with, of each prompt: its own text with echo, else nothing."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    before: Sequence[str]

    def choice(self, place: int, completion: Completion) -> dict[str, Any]:
        """A choice of the answer to the prompt at `place`, without its index."""
        choice: dict[str, Any] = {
            "text": self.before[place] + completion.text,
            "logprobs": None if self.body.logprobs is None else self._logprobs(place, completion),
            "finish_reason": completion.finish_reason,
        }
        if self.body.return_token_ids:
            choice |= {"token_ids": completion.tokens, "prompt_token_ids": self.prompts[place]}
        return choice

    def writer(self, place: int, index: int) -> Write:
        """A chunk per visible piece of text, or per token where its number or its log-prob is asked for."""
        offsets, begun, body = Offsets(self.service.pieces), False, self.body

        def choice_of(text: str, reason: str | None = None) -> dict[str, Any]:
            return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

        def write(event: Event) -> Iterator[dict[str, Any]]:
            nonlocal begun
            ended = event.completion
            if not begun and (body.echo or body.return_token_ids):
                ids = {"prompt_token_ids": self.prompts[place], "token_ids": []} if body.return_token_ids else {}
                yield choice_of(self.before[place]) | ids
            begun = True
            if not event.text and ended is None and body.logprobs is None and not body.return_token_ids:
                return
            choice = choice_of(event.text, None if ended is None else ended.finish_reason)
            tokens = [] if event.token is None else [event.token]
            if body.logprobs is not None:
                rows = [(token, event.policy_logprob, event.top_logprobs) for token in tokens]
                choice["logprobs"] = self.listed(rows, offsets.push(tokens))
            if body.return_token_ids:
                choice["token_ids"] = ended.tokens if ended is not None and body.use_beam_search else tokens
            yield choice

        return write

    def _logprobs(self, place: int, completion: Completion) -> dict[str, Any]:
        """Every token with its log-prob, the alternatives and its place in the text; the first of a prompt has none."""
        offsets = Offsets(self.service.pieces)
        rows: list[Row] = []
        places: list[int] = []
        if self.body.echo:
            assert completion.prompt_logprobs is not None
            tokens, own = self.prompts[place], completion.prompt_logprobs
            top = completion.prompt_top_logprobs or [
                None if logprob is None else {token: logprob} for token, logprob in zip(tokens, own, strict=True)
            ]
            rows += zip(tokens, own, top, strict=True)
            places += offsets.push(tokens, prompt=self.before[place])
        assert completion.top_logprobs is not None
        rows += zip(completion.tokens, completion.policy_logprobs, completion.top_logprobs, strict=True)
        return self.listed(rows, places + offsets.push(completion.tokens))

    def listed(self, rows: Sequence[Row], offsets: list[int]) -> dict[str, Any]:
        """The `logprobs` of some tokens: each one's own, its alternatives', and where it begins in the text."""
        pieces = self.service.pieces
        return {
            "tokens": [pieces.text(token) for token, _, _ in rows],
            "token_logprobs": [None if logprob is None else max(logprob, LEAST_LOGPROB) for _, logprob, _ in rows],
            "top_logprobs": [
                None if best is None else {t: max(p, LEAST_LOGPROB) for t, p in pieces.by_text(best).items()}
                for _, _, best in rows
            ],
            "text_offset": offsets,
        }
