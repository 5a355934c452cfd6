"""What the engine is asked, how far each sample of it has come, and beam search over one request. Free of torch.

A `Request` is one prompt with its parameters; a `Sequence` is one sample of it (or one live beam). A sequence needs
the keys and values of all its tokens but the last in the cache before its next token can be drawn: `pending` tokens
are still to be fed. Prefill, decoding and the recompute after a preemption are the same thing with other counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from upslope.errors import ConfigError, DataError, UpslopeError
from upslope.types import Completion, FinishReason, SamplingParams

TokenMask = Callable[[list[int], list[int]], Any]
"""(prompt tokens, generated tokens) -> the allowed token ids, or a bool per vocabulary entry, or None for all."""


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and how to continue it; `limit` is max_tokens cut to what the model's context holds.

    `stop_ids` are the engine's end-of-sequence ids (unless ignored) and the request's own. `key` and `first_sample`
    place its random numbers. `open` counts samples that have not finished.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    limit: int
    stop_ids: frozenset[int] = frozenset()
    key: int = 0
    first_sample: int = 0
    token_mask: TokenMask | None = None
    stream: bool = False
    open: int = 0
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None

    def __post_init__(self) -> None:
        self.open = self.params.n
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(self.prompt)
            self.prompt_top_logprobs = [None] * len(self.prompt)

    @property
    def needs_prompt_scores(self) -> bool:
        """True while a prompt token's log-prob is missing: then cached prompt blocks cannot be skipped."""
        return self.prompt_logprobs is not None and None in self.prompt_logprobs[1:]


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample (or beam) of a request: its tokens, its blocks, and what has been drawn.

    `tokens` is the prompt followed by the generated tokens; `cached` of them have keys and values in `blocks`, and
    the first `committed` blocks are known to the prefix cache under `keys`. `forks` siblings will be split off when
    the prompt has been computed. `text` is the incremental detokeniser, where one is needed. `rows` say where the
    activations of the fed tokens are kept; None where some are not.
    """

    request: Request
    sample: int
    tokens: list[int]
    forks: int = 0
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    keys: list[bytes] = field(default_factory=list)
    committed: int = 0
    sampling_logprobs: list[float] = field(default_factory=list)
    policy_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    version: int | None = None
    mixed_versions: bool = False
    text: Any = None
    rows: list[int] | None = field(default_factory=list)

    @property
    def order(self) -> tuple[int, int]:
        """Age: who is served first and preempted last."""
        return self.request.id, self.sample

    @property
    def pending(self) -> int:
        """Tokens to feed before the next one can be drawn; 0 while a beam waits for its siblings."""
        return len(self.tokens) - self.cached

    @property
    def generated(self) -> list[int]:
        """A copy of the tokens after the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def num_generated(self) -> int:
        """How many tokens were drawn so far."""
        return len(self.tokens) - len(self.request.prompt)

    def append(self, token: int, sampling_logprob: float, policy_logprob: float, version: int) -> None:
        """Add a drawn token; the completion carries the oldest version that drew one of its tokens."""
        self.tokens.append(token)
        self.sampling_logprobs.append(sampling_logprob)
        self.policy_logprobs.append(policy_logprob)
        if self.version is None:
            self.version = version

    def child(self, sample: int) -> Sequence:
        """A sibling with the same history; its blocks are shared by `BlockPool.fork`."""
        return Sequence(
            self.request,
            sample,
            list(self.tokens),
            keys=list(self.keys),
            sampling_logprobs=list(self.sampling_logprobs),
            policy_logprobs=list(self.policy_logprobs),
            top_logprobs=list(self.top_logprobs),
            version=self.version,
            mixed_versions=self.mixed_versions,
            rows=None if self.rows is None else list(self.rows),
        )

    def completion(self, reason: FinishReason, text: str, version: int) -> Completion:
        """The record handed out; `version` is used where nothing was drawn."""
        request = self.request
        return Completion(
            tokens=self.generated,
            sampling_logprobs=list(self.sampling_logprobs),
            policy_logprobs=list(self.policy_logprobs),
            finish_reason=reason,
            version=version if self.version is None else self.version,
            text=text,
            top_logprobs=list(self.top_logprobs) if request.params.logprobs is not None else None,
            prompt_logprobs=None if request.prompt_logprobs is None else list(request.prompt_logprobs),
            prompt_top_logprobs=request.prompt_top_logprobs if request.params.prompt_logprobs else None,
            mixed_versions=self.mixed_versions,
            cumulative_logprob=math.fsum(self.policy_logprobs),
        )


@dataclass(frozen=True, slots=True)
class Event:
    """What one step did to one sample: a token, newly visible text, the finished completion, or an error.

    `text` is filled as it becomes visible for streamed requests (text that may yet turn out to be a stop string, and
    bytes of an unfinished character, are held back) and once, whole, at the end for the others. An `error` ends the
    whole request; it concerns no other request.
    """

    request_id: int
    sample: int
    token: int | None = None
    policy_logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    text: str = ""
    completion: Completion | None = None
    error: UpslopeError | None = None


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Refuse sampling parameters that have no meaning: ConfigError that names the option, its value and its range."""
    p, least = params, int(params.prompt_logprobs is None)
    ranges = (
        ("temperature", p.temperature, "a finite number >= 0", 0 <= p.temperature < math.inf),
        ("top_k", p.top_k, ">= 0 (0 switches it off)", p.top_k >= 0),
        ("top_p", p.top_p, "in (0, 1]", 0 < p.top_p <= 1),
        ("min_p", p.min_p, "in [0, 1]", 0 <= p.min_p <= 1),
        ("repetition_penalty", p.repetition_penalty, "a finite number > 0", 0 < p.repetition_penalty < math.inf),
        ("frequency_penalty", p.frequency_penalty, "in [-2, 2]", -2 <= p.frequency_penalty <= 2),
        ("presence_penalty", p.presence_penalty, "in [-2, 2]", -2 <= p.presence_penalty <= 2),
        ("n", p.n, ">= 1", p.n >= 1),
        ("beam_width", p.beam_width, ">= 1", p.beam_width >= 1),
        ("length_penalty", p.length_penalty, "a finite number", math.isfinite(p.length_penalty)),
        ("logprobs", p.logprobs, f"in 0..{vocab_size}", 0 <= (p.logprobs or 0) <= vocab_size),
        ("prompt_logprobs", p.prompt_logprobs, f"in 0..{vocab_size}", 0 <= (p.prompt_logprobs or 0) <= vocab_size),
        ("max_tokens", p.max_tokens, ">= 1 (0 only with prompt_logprobs)", p.max_tokens >= least),
        ("stop", p.stop, "a tuple of non-empty strings", not isinstance(p.stop, str) and all(p.stop)),
        (
            "logit_bias",
            dict(p.logit_bias),
            f"token ids in 0..{vocab_size - 1} with numbers that are not NaN or +inf",
            all(0 <= t < vocab_size and b < math.inf for t, b in p.logit_bias.items()),
        ),
    )
    for name, value, meaning, fine in ranges:
        if not fine:
            raise ConfigError(f"sampling option {name} = {value!r}: must be {meaning}")
    if p.beam_width == 1:
        return
    # beam search is deterministic and ranks whole sequences: refuse what it cannot honour
    if p.n > p.beam_width:
        raise ConfigError(f"sampling option n = {p.n}: at most beam_width = {p.beam_width} sequences are returned")
    told = p.logprobs is not None
    idle = {"top_k": p.top_k, "top_p": p.top_p < 1, "min_p": p.min_p, "stop": p.stop, "logprobs": told}
    for name, given in idle.items():
        if given:
            raise ConfigError(f"sampling option {name} has no meaning with beam_width = {p.beam_width}: leave it out")
    if p.max_tokens < 1:
        raise ConfigError("sampling option max_tokens = 0: beam search needs at least one token")


def check_prompt(prompt: Iterable[int], vocab_size: int, max_positions: int) -> list[int]:
    """The prompt as a list, or DataError: empty, token out of range, or no room left in the context."""
    tokens = [int(t) for t in prompt]
    if not tokens:
        raise DataError("the prompt is empty: give at least one token (for example the beginning-of-sequence token)")
    if len(tokens) >= max_positions:
        raise DataError(
            f"the prompt has {len(tokens)} tokens but the model's context holds {max_positions}, "
            "one of them for the reply: shorten the prompt"
        )
    wrong = next((t for t in tokens if not 0 <= t < vocab_size), None)
    if wrong is not None:
        raise DataError(f"prompt token {wrong} is outside the model's vocabulary 0..{vocab_size - 1}")
    return tokens


@dataclass(frozen=True, slots=True)
class Candidate:
    """One continuation of a beam by one token."""

    token: int
    sampling_logprob: float
    policy_logprob: float


@dataclass(slots=True)
class Beam:
    """The beams of one request: which live on, which are finished, and when to stop.

    Score of a sequence = sum of its log-probs / length ** length_penalty, the end-of-sequence token counted (Wu et al.
    2016, arXiv 1609.08144, without the constants). A continuation that ends is kept as finished only if it ranks among
    the best `width` of its step, so that a poor early end cannot win by being short; the best `width` that do not end
    live on. The search stops when no live beam can still beat the n-th best finished one: with log-probs <= 0 a beam's
    best reachable score is bounded by its present sum over the largest (or, for a negative penalty, the next) length.

    `live` maps a beam's sample number to (sequence, sum of log-probs).
    """

    request: Request
    live: dict[int, tuple[Sequence, float]]
    reports: dict[int, list[Candidate]] = field(default_factory=dict)
    finished: list[tuple[float, Sequence, FinishReason]] = field(default_factory=list)

    @property
    def candidates_wanted(self) -> int:
        """Best continuations each beam must report so that `width` of them do not end."""
        return self.request.params.beam_width + len(self.request.stop_ids)

    def report(self, seq: Sequence, candidates: list[Candidate]) -> bool:
        """Take a beam's continuations, best first; True when every live beam has reported."""
        self.reports[seq.sample] = candidates
        return len(self.reports) == len(self.live)

    def advance(self, version: int) -> tuple[list[Sequence], list[tuple[Sequence, Sequence]]]:
        """One step of the search: (the old beams, to be removed; (parent, child) pairs, to be forked)."""
        width, stop_ids = self.request.params.beam_width, self.request.stop_ids
        ranked = sorted(
            (-(score + c.sampling_logprob), slot, c.token, c)
            for slot, (_, score) in self.live.items()
            for c in self.reports[slot]
        )
        old, survivors, live = [seq for seq, _ in self.live.values()], [], {}
        for rank, (loss, slot, token, candidate) in enumerate(ranked):
            ends = token in stop_ids
            if len(live) == width or (ends and rank >= width):
                continue
            parent = self.live[slot][0]
            child = parent.child(len(live))
            child.append(token, candidate.sampling_logprob, candidate.policy_logprob, version)
            if ends or child.num_generated >= self.request.limit:
                self.finished.append((self._score(-loss, child.num_generated), child, "stop" if ends else "length"))
            else:
                survivors.append((parent, child))
            if not ends:
                live[len(live)] = (child, -loss)
        self.live, self.reports = live, {}
        if self._decided():
            self.live, survivors = {}, []
        return old, survivors

    def best(self) -> list[tuple[Sequence, FinishReason]]:
        """The n best finished sequences, best first; fewer only where the token mask left fewer."""
        order = sorted(range(len(self.finished)), key=lambda i: (-self.finished[i][0], i))
        return [self.finished[i][1:] for i in order[: self.request.params.n]]

    def _score(self, total: float, length: int) -> float:
        return total / length**self.request.params.length_penalty

    def _decided(self) -> bool:
        """Nothing that still lives can enter the n best."""
        limit, n = self.request.limit, self.request.params.n
        alive = [(seq.num_generated, total) for seq, total in self.live.values() if seq.num_generated < limit]
        if not alive:
            return True
        if len(self.finished) < n:
            return False
        worst = sorted((score for score, _, _ in self.finished), reverse=True)[n - 1]
        return all(max(self._score(total, limit), self._score(total, length + 1)) <= worst for length, total in alive)
