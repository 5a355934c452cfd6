"""From a request's fields to the engine's parameters."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from upslope.serving.bodies import SamplingBody
from upslope.serving.errors import ApiError
from upslope.types import Completion, SamplingParams

__all__ = ["best", "sampling_params"]


def sampling_params(
    body: SamplingBody,
    vocab_size: int,
    *,
    max_tokens: int = 256,
    logprobs: int | None = None,
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
    drawn = body.n if body.best_of is None else body.best_of
    if body.use_beam_search:
        _check_beam(body, logprobs)
    return SamplingParams(
        max_tokens=max_tokens,
        n=body.n if body.use_beam_search else drawn,
        beam_width=drawn if body.use_beam_search else 1,
        length_penalty=body.length_penalty,
        temperature=body.temperature,
        top_k=max(body.top_k, 0),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=bias,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
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
