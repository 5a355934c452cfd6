"""What may be sent. A field that is not listed is refused by name; null means that a field was not given.

Names and ranges are OpenAI's; those that OpenAI does not have are vLLM's.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

__all__ = [
    "Body",
    "CompletionBody",
    "Items",
    "Prompt",
    "SamplingBody",
    "StreamOptions",
    "Strict",
    "Token",
    "WeightsBody",
]

MAX_SAMPLES = 128
MAX_LOGPROBS = 20
MAX_BIASES = 4096

Items = Field(fail_fast=True)
"""A list of which the first wrong item is told; the others are not even looked at."""
Token = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


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


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"{len(value)} tokens, at most {MAX_BIASES} are taken")
    return value


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


class StreamOptions(Body):
    """include_usage: a last chunk without choices carries the counts of tokens."""

    include_usage: bool = False


class SamplingBody(Body):
    """What /v1/completions and /v1/chat/completions have in common: the model, and how tokens are drawn.

    A seed makes the text repeat, whatever else is running; without one every answer differs.
    """

    model: str | None = None
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
    ] = {}
    best_of: int | None = Field(None, ge=1, le=MAX_SAMPLES, description="Draw so many, answer with the n best.")
    use_beam_search: bool = Field(False, description="Beam search of width best_of, else n.")
    length_penalty: float = Field(1.0, ge=-10, le=10, description="Of beam search.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    user: str | None = Field(None, description="Accepted and not used: nothing is kept of who asked.")

    @model_validator(mode="after")
    def _fits_together(self) -> SamplingBody:
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
    def _says_something(self) -> CompletionBody:
        if self.prompt in ([], [[]]):
            raise ValueError("prompt is an empty list")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0; without echo there is nothing to answer then")
        if self.stream and self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs cannot be streamed; leave out stream")
        return self


class WeightsBody(Body):
    """/admin/weights: where the new weights are, as `upslope serve` would be told."""

    model: str | None = None
    source: str = Field(min_length=1, max_length=4096)
