"""What may be sent. A field that is not listed is refused by name; null means that a field was not given.

Names and ranges are OpenAI's; those that OpenAI does not have are vLLM's. How tokens are drawn: the fields that say it,
and what the engine makes of them.
"""

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from upslope.serving.errors import ApiError
from upslope.types import Completion, SamplingParams

Items = Field(fail_fast=True)
"""A list of which the first wrong item is told; the others are not even looked at."""
Token = Annotated[int, Field(ge=0, lt=2**31)]


def _kind_of_prompt(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else ""
    if not isinstance(value, list):
        return "(text)"
    return "(texts)" if isinstance(first, str) else "(token lists)" if isinstance(first, list) else "(tokens)"


Prompt = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[str], Items, Tag("(texts)")]
    | Annotated[list[Token], Items, Tag("(tokens)")]
    | Annotated[list[Annotated[list[Token], Items]], Items, Tag("(token lists)")],
    Discriminator(_kind_of_prompt),
]
"""A text, texts, tokens, or lists of tokens: what the first item is, so that no other kind is tried."""


class Strict(BaseModel):
    """A JSON object of which every field is known and has the right type, without any conversion."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_surplus_is_enough(cls, data: Any) -> Any:
        """Of the fields that are not known only the first, so that refusing a hundred thousand is quick."""
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        surplus = next((key for key in data if key not in known), None)
        return {key: value for key, value in data.items() if key in known or key == surplus}


class Body(Strict):
    """A Strict object in which null means that a field was not given."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class ModelBody(Body):
    """What is said to one model; the first one where none is named."""

    model: str | None = None


class UserBody(ModelBody):
    """What OpenAI's clients may send under a user's name."""

    user: str | None = Field(None, description="Accepted and not used: nothing is kept of who asked.")


MAX_SAMPLES = 128
MAX_LOGPROBS = 20
MAX_BIASES = 4096
_PENALTIES = {"length_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty"}
_AS_GIVEN = _PENALTIES | {"temperature", "top_p", "min_p", "ignore_eos"}
Stop = Annotated[str, Field(min_length=1, max_length=256)]


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"{len(value)} tokens, at most {MAX_BIASES} are taken")
    return value


class StreamOptions(Body):
    """include_usage: a last chunk without choices carries the counts of tokens."""

    include_usage: bool = False


class SamplingBody(UserBody):
    """What /v1/completions and /v1/chat/completions have in common: how tokens are drawn.

    A seed makes the text repeat, whatever else is running; without one every answer differs.
    """

    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: list[Token] = Field([], max_length=256)
    ignore_eos: bool = False
    temperature: float = Field(1.0, ge=0, le=100, description="0 is greedy; else at least 0.001.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31, description="0 and -1 switch it off.")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
        BeforeValidator(_few),
    ] = Field({})
    best_of: int | None = Field(None, ge=1, le=MAX_SAMPLES, description="Draw so many, answer with the n best.")
    use_beam_search: bool = Field(False, description="Beam search of width best_of, else n.")
    length_penalty: float = Field(1.0, ge=-10, le=10, description="Of beam search.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or at least 0.001")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of is {self.best_of}, less than n = {self.n}")
        if self.stream and (self.best_of or 0) > self.n and not self.use_beam_search:
            raise ValueError("best_of chooses when all is done, so that it cannot be streamed; leave out stream")
        if self.length_penalty != 1.0 and not self.use_beam_search:
            raise ValueError("length_penalty belongs to use_beam_search")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belongs to stream")
        return self

    @property
    def drawn(self) -> int:
        """Samples that are drawn at a time."""
        return self.n if self.best_of is None else self.best_of

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage


def sampling_params(
    body: SamplingBody,
    vocab_size: int,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The parameters that a body asks for; a seed is made up where it names none.

    ApiError 400 for a token outside the vocabulary, and for what beam search cannot honour.
    """
    bias = {int(token): value for token, value in body.logit_bias.items()}
    for name, tokens in (("logit_bias", bias), ("stop_token_ids", body.stop_token_ids)):
        wrong = next((token for token in tokens if token >= vocab_size), None)
        if wrong is not None:
            raise ApiError(400, f"{name}: token {wrong} is outside the vocabulary of {vocab_size} tokens", name)
    if body.use_beam_search:
        _check_beam(body, logprobs)
    return SamplingParams(
        max_tokens=max_tokens,
        n=body.n if body.use_beam_search else body.drawn,
        beam_width=body.drawn if body.use_beam_search else 1,
        top_k=max(body.top_k, 0),
        logit_bias=bias,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids),
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **body.model_dump(include=_AS_GIVEN),
    )


def best(completions: Sequence[Completion], n: int) -> list[Completion]:
    """The n completions with the highest mean log-prob per token, best first; all, in order, where there are n."""
    if len(completions) <= n:
        return list(completions)
    return sorted(completions, key=lambda c: -c.cumulative_logprob / max(len(c.tokens), 1))[:n]


def _check_beam(body: SamplingBody, logprobs: int | None) -> None:
    idle = {"top_k": body.top_k > 0, "top_p": body.top_p < 1, "min_p": body.min_p > 0, "stop": bool(body.stop)}
    idle["logprobs"] = logprobs is not None
    for name, given in idle.items():
        if given:
            raise ApiError(400, f"{name} has no meaning with use_beam_search; leave it out", name)
    if body.best_of is None and body.n == 1:
        raise ApiError(400, "use_beam_search needs a width: give best_of (or n)", "best_of")
