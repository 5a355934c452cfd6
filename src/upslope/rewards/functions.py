"""Built-in reward functions. Each is total: any text gets a finite judgement, and no text is ever run.

A reward function takes (prompts, completions) and its own parameters by name, and returns one judgement per
completion. If it names a parameter `num_tokens` or `finish_reasons`, the judge fills in one per completion.
`inline_safe` marks those that are quick on any text, so that they need no worker process.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from upslope.errors import ConfigError, DataError
from upslope.types import Prompt, Reward

F = TypeVar("F", bound=Callable[..., Any])


def quick(function: F) -> F:
    function.inline_safe = True  # type: ignore[attr-defined]
    return function


@quick
def length(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    target: int,
    unit: str = "words",
    num_tokens: Sequence[int] | None = None,
) -> list[float]:
    """Closeness of the length to `target`: max(0, 1 - |length - target| / target), in [0, 1].

    unit: "words" (split at white space), "characters" or "tokens" (those the policy sampled, the end included).
    Source: the linear length reward of L1 (2503.04697), scaled to [0, 1].
    """
    if target < 1:
        raise ConfigError(f"reward 'length': target must be at least 1, got {target}")
    counts = _lengths(completions, unit, num_tokens)
    return [max(0.0, 1.0 - abs(count - target) / target) for count in counts]


def _lengths(completions: Sequence[str], unit: str, num_tokens: Sequence[int] | None) -> Sequence[int]:
    if unit == "words":
        return [len(text.split()) for text in completions]
    if unit == "characters":
        return [len(text) for text in completions]
    if unit == "tokens":
        if num_tokens is None:
            raise DataError("reward 'length': unit=tokens needs the completions' token counts (num_tokens)")
        return num_tokens
    raise ConfigError(f"reward 'length': unit must be words, characters or tokens, not '{unit}'")


def format(prompts: Sequence[Prompt], completions: Sequence[str], *, pattern: str) -> list[float]:
    """1 where the whole reply, stripped, matches the regular expression `pattern`, else 0 (`.` matches newlines).

    Source: the format reward of DeepSeek-R1 (2501.12948, section 2.2.2). Not inline_safe: a pattern can take
    exponential time on some replies, which the judge's time limit ends.
    """
    compiled = _compiled(pattern)
    return [float(compiled.fullmatch(text.strip()) is not None) for text in completions]


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"reward 'format': '{pattern}' is not a regular expression ({error})") from None


@quick
def json_object(
    prompts: Sequence[Prompt], completions: Sequence[str], *, keys: str = "", exact: bool = False
) -> list[float]:
    """1 where the whole reply is one JSON object with every one of `keys` (written a|b|c), else 0.

    exact: no other key may occur. Strict JSON (RFC 8259): no NaN or Infinity, no key given twice, nothing around it.
    """
    wanted = {key for key in keys.split("|") if key}
    return [float(_is_object(text, wanted, exact)) for text in completions]


def _is_object(text: str, wanted: set[str], exact: bool) -> bool:
    try:
        value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_without_repeats, parse_int=str)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and (set(value) == wanted if exact else set(value) >= wanted)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


@quick
def repetition(prompts: Sequence[Prompt], completions: Sequence[str], *, ngram: int = 3) -> list[float]:
    """Minus the share of repeated word n-grams: -(1 - distinct / all), in (-1, 0]; 0 below two n-grams.

    Source: the n-gram repetition penalty of 2502.03373 (section 3.4), per reply.
    """
    if ngram < 1:
        raise ConfigError(f"reward 'repetition': ngram must be at least 1, got {ngram}")
    return [distinct_share(text, ngram) - 1.0 for text in completions]


def distinct_share(text: str, n: int) -> float:
    """Different word n-grams over all of them, letter case aside; 1 where there is none."""
    grams = ngrams(text, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams of a text's words in lower case."""
    words = text.casefold().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@quick
def exact_match(
    prompts: Sequence[Prompt], completions: Sequence[str], *, ignore_case: bool = False
) -> list[Reward | None]:
    """1 and correct where the reply is the prompt's answer, white space at both ends aside; else 0.

    None (no verdict, the sample is excluded) for a prompt without an answer.
    """
    return [_matches(prompt.answer, text, ignore_case) for prompt, text in zip(prompts, completions, strict=True)]


def _matches(answer: str | None, text: str, ignore_case: bool) -> Reward | None:
    if answer is None:
        return None
    left, right = text.strip(), answer.strip()
    correct = left.casefold() == right.casefold() if ignore_case else left == right
    return Reward(value=float(correct), correct=correct)
