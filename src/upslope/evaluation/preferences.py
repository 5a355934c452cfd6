"""Which of two answers is better: how often a reward model agrees with people, and a win rate by a judge.

The judge is a chat model behind any OpenAI-compatible URL. Judges prefer a position (Zheng et al. 2023, 2306.05685,
section 3.3), so every pair is asked about twice, with the answers swapped: a row scores the mean of the two verdicts, 1
for a win, 0.5 for a tie, 0 for a loss. A reply counts only if its last line is a verdict and nothing else; other
replies are counted and shown, never guessed at.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self

from upslope.data.examples import pairs_of
from upslope.data.records import Record
from upslope.errors import ConfigError, DataError, RunError, one_line
from upslope.evaluation.measurement import Figure, share
from upslope.extras import require
from upslope.rewards.summands import NetworkReward
from upslope.types import Example, Prompt, Rollout, RolloutGroup


def reward_accuracy(
    reward_model: NetworkReward, records: Sequence[Record], *, dataset: str = "", seed: int = 0, batch: int = 64
) -> Figure:
    """Share of the pairs {prompt, chosen, rejected} whose chosen answer scores higher; equal scores count half.

    Answers are read in the model's own tokens, up to the token that ends the turn. detail: `ties`, and `errors` with
    `first_error` for pairs that could not be scored (longer than the model's context), which are not in n. Interval:
    Wilson's where there is no tie, else the bootstrap over pairs. DataError: rows of another kind, or nothing scored.
    """
    pairs = pairs_of(records, reward_model.tokenizer, max_length=None).rows
    values: list[float] = []
    ties, errors = 0, []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        groups = [
            RolloutGroup(Prompt(key=i), [_rollout(pair.chosen, 0), _rollout(pair.rejected, 1)])
            for i, pair in enumerate(part, start)
        ]
        found = reward_model.rewards(groups)
        for pair, chosen, rejected in zip(part, found[::2], found[1::2], strict=True):
            if chosen.value is None or rejected.value is None:
                errors.append(f"{pair.where}: {chosen.error or rejected.error or 'not scored'}")
                continue
            ties += chosen.value == rejected.value
            values.append(0.5 if chosen.value == rejected.value else float(chosen.value > rejected.value))
    if not values:
        raise DataError(f"no pair could be scored; the first: {errors[0]}")
    detail: dict[str, Any] = {"of": len(pairs), "ties": ties, "errors": len(errors)}
    if errors:
        detail["first_error"] = errors[0]
    return Figure("reward_accuracy", *share(values, seed), len(values), dataset, detail=detail)


def _rollout(example: Example, sample: int) -> Rollout:
    """The answer as if it had been sampled: the tokens from the first one that is trained on."""
    first = example.mask.index(True)
    tokens = example.tokens[first:]
    return Rollout(
        prompt_tokens=example.tokens[:first],
        tokens=tokens,
        mask=[True] * len(tokens),
        sampling_logprobs=[],
        policy_logprobs=[],
        finish_reason="stop",
        text="",
        sample=sample,
    )


INSTRUCTIONS = (
    "You compare two answers to the same request. Judge helpfulness, correctness and clarity; neither the order of the "
    "answers nor their length matters. Think briefly, then end your reply with a line that holds your verdict and "
    "nothing else: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if they are equally good."
)
_MARKS: Mapping[str, float] = {"[[A]]": 1.0, "[[B]]": 0.0, "[[C]]": 0.5}
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0
_MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Comparison:
    """A request, the answer that is measured, and the one it is measured against."""

    prompt: str
    candidate: str
    reference: str
    where: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """score: 1 where the first answer is better, 0 the second, 0.5 neither; None with the reason in `error`."""

    score: float | None
    error: str = ""
    kind: Literal["", "unparsable", "failed"] = ""


class PairJudge:
    """A chat model behind an OpenAI-compatible URL. A context manager that closes its connections.

    base_url: up to and with /v1. api_key: sent as a bearer token. timeout: seconds within which
    an answer is complete, however slowly. retries: after a request that failed for a passing reason (connection,
    408, 429, 5xx), with waits of 1, 2, 4, ... s or what Retry-After says, 60 s at most. concurrency: requests under way
    at once. max_failures: requests lost in spite of their retries before the whole comparison stops. sleep: replaced in
    tests.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        concurrency: int = 8,
        max_failures: int = 8,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        for name, value, least in (("retries", retries, 0), ("concurrency", concurrency, 1)):
            if value < least:
                raise ConfigError(f"judge option {name} is {value}; it must be at least {least}")
        self._httpx = require("eval", "httpx")
        try:
            url = self._httpx.URL(base_url)
        except self._httpx.InvalidURL as error:
            raise ConfigError(f"judge URL {base_url!r}: {error}") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"judge URL {base_url!r}: must be http:// or https://, a host, and end with /v1")
        self.base_url, self.model, self.retries, self.timeout = base_url.rstrip("/"), model, retries, timeout
        self.concurrency, self.max_failures, self._sleep = concurrency, max_failures, sleep
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = self._httpx.Client(headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def verdict(self, prompt: str, first: str, second: str) -> Verdict:
        """Which of two answers is better, as the judge sees them in this order.

        RunError: the judge refuses the request for good (401, 404, 400, ...).
        """
        asked = f"Request:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}"
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": asked}],
            "temperature": 0.0,
            "max_tokens": _MAX_TOKENS,
        }
        error, wait = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                self._sleep(wait)
            wait = min(2.0**attempt, _LONGEST_WAIT)
            try:
                deadline = time.monotonic() + self.timeout
                data = b""
                with self._client.stream("POST", f"{self.base_url}/chat/completions", json=body) as response:
                    for chunk in response.iter_bytes():
                        data += chunk
                        if time.monotonic() > deadline:  # the client's own limit is on each read: a trickle passes
                            raise self._httpx.ReadTimeout(f"the answer is not complete after {self.timeout:g} s")
                text = data.decode(errors="replace")
            except self._httpx.RequestError as problem:
                error = f"{type(problem).__name__}: {one_line(problem, 200)}"
                continue
            if response.status_code in _RETRIED:
                error = f"status {response.status_code}: {one_line(text, 200)}"
                wait = _retry_after(response.headers.get("retry-after"), wait)
                continue
            if response.status_code != 200:
                raise RunError(
                    f"the judge at {self.base_url} answers {response.status_code}: {one_line(text, 200)}; check the "
                    "URL, the model's name and the key"
                )
            return _parsed(text)
        return Verdict(None, f"no answer after {self.retries + 1} tries, {error}", "failed")


def win_rate(judge: PairJudge, rows: Sequence[Comparison], *, dataset: str = "", seed: int = 0) -> Figure:
    """How often the candidates win, ties half, each pair judged in both orders.

    n counts rows with two verdicts. detail: `of` rows in all; wins, ties, losses (of rows, by their mean),
    `inconsistent` (rows whose verdict followed the position), `unparsable` and `failed` verdicts with
    `first_unparsable` and `first_failed`, and `not_judged` rows that have one of these. Interval: Wilson's where every
    row is won or lost, else the bootstrap over rows. RunError: the judge cannot be reached or refuses; DataError: no
    rows, or not one was judged.
    """
    if not rows:
        raise DataError("there is nothing to compare: no rows")
    failures = 0

    def ask(task: tuple[Comparison, bool]) -> Verdict:
        nonlocal failures
        row, swapped = task
        if failures > judge.max_failures:
            return Verdict(None, "not asked: too many requests were lost", "failed")
        first, second = (row.reference, row.candidate) if swapped else (row.candidate, row.reference)
        found = judge.verdict(row.prompt, first, second)
        failures += found.kind == "failed"
        return found

    with ThreadPoolExecutor(judge.concurrency) as pool:
        verdicts = list(pool.map(ask, [(row, swapped) for row in rows for swapped in (False, True)]))
    lost = [v for v in verdicts if v.kind == "failed"]
    if failures > judge.max_failures:
        raise RunError(f"{len(lost)} of {len(verdicts)} requests to {judge.base_url} were lost; first: {lost[0].error}")
    scores, inconsistent = [], 0
    for straight, swapped in zip(verdicts[::2], verdicts[1::2], strict=True):
        if straight.score is None or swapped.score is None:
            continue
        scores.append((straight.score + 1 - swapped.score) / 2)
        inconsistent += {straight.score, swapped.score} <= {0.0, 1.0} and straight.score == swapped.score
    detail: dict[str, Any] = {
        "judge": judge.model,
        "of": len(rows),
        "wins": sum(s > 0.5 for s in scores),
        "ties": sum(s == 0.5 for s in scores),
        "losses": sum(s < 0.5 for s in scores),
        "inconsistent": inconsistent,
        "not_judged": len(rows) - len(scores),
    }
    for kind in ("unparsable", "failed"):
        found = [v.error for v in verdicts if v.kind == kind]
        detail[kind] = len(found)
        if found:
            detail[f"first_{kind}"] = found[0]
    if not scores:
        error = next(v.error for v in verdicts if v.score is None)
        raise DataError(f"the judge gave no usable pair of verdicts for {len(rows)} rows; the first: {error}")
    return Figure("win_rate", *share(scores, seed), len(scores), dataset, detail=detail)


def _parsed(text: str) -> Verdict:
    """The verdict of a response's body."""
    try:
        content = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return Verdict(None, f"no chat completion: {one_line(text, 200)}", "unparsable")
    if not isinstance(content, str):
        return Verdict(None, f"no text in the reply: {one_line(content, 200)}", "unparsable")
    last = ["", *content.strip().splitlines()][-1]
    if (score := _MARKS.get(last.strip())) is None:
        return Verdict(None, f"the last line is no verdict: {one_line(last, 200)!r}", "unparsable")
    return Verdict(score)


def _retry_after(value: str | None, wait: float) -> float:
    """Seconds a server asks to wait; dates and rubbish are not followed."""
    with suppress(ValueError):
        if math.isfinite(seconds := float(value or "")):
            return min(max(seconds, 0.0), _LONGEST_WAIT)
    return wait
