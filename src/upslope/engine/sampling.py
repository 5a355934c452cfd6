"""From logits to tokens: counter-based uniforms, inverse CDF, exact filters, and both log-probs of what was drawn.

Shapes: N rows (one token to draw each), V vocabulary. The order is fixed: repetition penalty, frequency and
presence penalty, logit bias, token mask, temperature, top-k, top-p (of what top-k left), min-p. Tokens tied with the
last one a filter keeps are kept too, so that the kept set depends on the distribution alone and not on how ties are
broken.

top-k: Fan et al. 2018 (arXiv 1805.04833); top-p: Holtzman et al. 2020 (arXiv 1904.09751); min-p: Nguyen et al. 2024
(arXiv 2407.01082); repetition penalty: Keskar et al. 2019 (arXiv 1909.05858); frequency and presence penalty: the
OpenAI API's definition, logit - count * frequency - (count > 0) * presence; splitmix64: Steele et al. 2014.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from upslope.engine.request import Candidate
from upslope.functional.logprobs import log_softmax
from upslope.kernels import rows as fused
from upslope.kernels import usable
from upslope.types import SamplingParams

_CHUNK = 256
_CANDIDATES = 256
_CPU_ROWS = 16  # a slice of so many rows stays in a processor's cache from the softmax to the draw: four times faster


@dataclass(slots=True)
class Row:
    """What one row of logits is drawn with.

    `uniform` in [0, 1) is the row's only randomness; `history` is the prompt (but for an encoder's) and what followed,
    read by the repetition penalty alone; `generated` what was drawn before, read by the frequency and the presence
    penalty alone; `allowed` [V] is the token mask, None for all.
    """

    params: SamplingParams
    uniform: float = 0.0
    history: list[int] = field(default_factory=list)
    allowed: Tensor | None = None
    generated: list[int] = field(default_factory=list)

    @property
    def adjusted(self) -> bool:
        """True when the logits themselves are changed before temperature and filters."""
        p = self.params
        return p.repetition_penalty != 1.0 or p.counted or bool(p.logit_bias) or self.allowed is not None

    @property
    def plain(self) -> bool:
        """True when the distribution sampled from is the policy's own at this temperature."""
        p = self.params
        return p.temperature > 0 and not (self.adjusted or p.top_k or p.top_p < 1 or p.min_p > 0)


@dataclass(slots=True)
class Drawn:
    """N drawn tokens; `top_logprobs` where the row asked for them, the drawn token's own included.

    A NaN policy log-prob marks logits with NaN or +inf in them; a NaN sampling log-prob alone marks a row in which
    every token was excluded.
    """

    tokens: list[int]
    sampling_logprobs: list[float]
    policy_logprobs: list[float]
    top_logprobs: list[dict[int, float] | None]


def uniforms(seeds: Sequence[int], keys: Sequence[int], samples: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) per row, a function of (seed, key, sample, position) and of nothing else.

    Four rounds of splitmix64 over the counters; the upper 53 bits become the float64.
    """
    state = np.zeros(len(seeds), dtype=np.uint64)
    for counters in (seeds, keys, samples, positions):
        state = _splitmix64(state ^ np.array([c & 0xFFFFFFFFFFFFFFFF for c in counters], dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def policy_temperature(params: SamplingParams) -> float:
    """The temperature of `policy_logprobs`: the request's own, 1 when decoding is greedy."""
    return params.temperature if params.temperature > 0 else 1.0


def sample(logits_NV: Tensor, rows: Sequence[Row]) -> Drawn:
    """Draw one token per row, each row as if it were alone.

    `policy_logprobs` are rows of `functional.log_softmax` over the untouched logits, the trainer's own function;
    `sampling_logprobs` are of the distribution drawn from: the same number for plain rows, 0 for greedy ones (a
    point mass), else the log-softmax over the kept tokens.
    """
    count = len(rows)
    drawn = Drawn([0] * count, [math.nan] * count, [math.nan] * count, [None] * count)
    kinds: dict[tuple[float, bool], list[int]] = {}
    for i, row in enumerate(rows):
        kinds.setdefault((row.params.temperature, row.plain), []).append(i)
    for (_, plain), kind in kinds.items():
        step = _CPU_ROWS if logits_NV.device.type == "cpu" and not (plain and usable(logits_NV)) else len(kind)
        for index in (kind[i : i + step] for i in range(0, len(kind), step)):
            logits = _rows_of(logits_NV, index)
            members = [rows[i] for i in index]
            temperature = policy_temperature(members[0].params)
            tokens, sampling = _draw_kind(logits, members)
            own = sampling if plain else _logprobs_of(logits, tokens, temperature)
            top = _alternatives(logits, members, tokens.tolist(), temperature)
            columns = (tokens.tolist(), sampling.tolist(), own.tolist(), top)
            for i, token, sampling_logprob, policy_logprob, best in zip(index, *columns, strict=True):
                drawn.tokens[i], drawn.top_logprobs[i] = token, best
                drawn.sampling_logprobs[i], drawn.policy_logprobs[i] = sampling_logprob, policy_logprob
    return drawn


def _rows_of(logits_NV: Tensor, index: list[int]) -> Tensor:
    """The rows with these rising numbers; a view where they follow each other."""
    if index[-1] - index[0] == len(index) - 1:
        return logits_NV[index[0] : index[-1] + 1]
    return logits_NV[torch.tensor(index, device=logits_NV.device)]


def _draw_kind(logits_NV: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Tokens [N] and their sampling log-probs for rows of one kind."""
    temperature = rows[0].params.temperature
    if temperature == 0:
        scores = adjust(logits_NV, rows) if any(row.adjusted for row in rows) else logits_NV
        best, tokens = scores.max(dim=-1)
        return tokens, torch.where(torch.isinf(best), torch.nan, 0.0)
    uniform = torch.tensor([row.uniform for row in rows], dtype=torch.float64, device=logits_NV.device)
    if not rows[0].plain:
        logits_NV = keep_filtered(
            adjust(logits_NV, rows).div_(temperature),
            [row.params.top_k for row in rows],
            [row.params.top_p for row in rows],
            [row.params.min_p for row in rows],
        )
        temperature = 1.0
    if usable(logits_NV):
        return fused.sample(logits_NV, uniform, temperature)
    logp = log_softmax(logits_NV, temperature)
    tokens = draw(logp, uniform)
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


def _logprobs_of(logits_NV: Tensor, tokens_N: Tensor, temperature: float) -> Tensor:
    if usable(logits_NV):
        return fused.statistics(logits_NV, tokens_N, temperature).logp
    return log_softmax(logits_NV, temperature).gather(1, tokens_N[:, None])[:, 0]


def _alternatives(
    logits_NV: Tensor, rows: Sequence[Row], tokens: Sequence[int], temperature: float
) -> list[dict[int, float] | None]:
    """`top_alternatives` of the rows that ask for them; the others' log-probs are not computed."""
    result: list[dict[int, float] | None] = [None] * len(rows)
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if wanted:
        logp = log_softmax(_rows_of(logits_NV, wanted), temperature)
        counts = [rows[i].params.logprobs or 0 for i in wanted]
        for i, best in zip(wanted, top_alternatives(logp, counts, [tokens[i] for i in wanted]), strict=True):
            result[i] = best
    return result


def draw(logp_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Inverse-CDF sampling in token order: log-probs [N, V], float64 uniforms [N] -> tokens [N].

    The first token whose cumulative probability exceeds u times the total is taken. Probabilities are float32,
    running sums float64, over chunks of 256 tokens first and inside the chosen chunk then. A token of probability
    zero can never be drawn, not even where rounding puts the target at the very end.
    """
    count, vocab = logp_NV.shape
    probs = logp_NV.exp()
    if vocab % _CHUNK:
        probs = torch.nn.functional.pad(probs, (0, -vocab % _CHUNK))
    chunks = probs.view(count, -1, _CHUNK)
    sums = chunks.sum(-1).double()
    running = sums.cumsum(-1)
    target = uniform_N[:, None] * running[:, -1:]
    chunk = _first_above(running, target, sums)
    here = sums.gather(1, chunk)
    inside = chunks[torch.arange(count, device=chunk.device), chunk[:, 0]].double()
    within = inside.cumsum(-1)
    rest = (target - (running.gather(1, chunk) - here)) / here * within[:, -1:]
    return (chunk * _CHUNK + _first_above(within, rest, inside))[:, 0].clamp_max(vocab - 1)


def _first_above(running: Tensor, target: Tensor, steps: Tensor) -> Tensor:
    """Index [N, 1] of the first running sum above the target that is a real step, else of the last real step."""
    width = steps.shape[1]
    last = width - 1 - (steps > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    index = torch.searchsorted(running, target.clamp_min(0), right=True)
    return torch.minimum(index, last)


def adjust(logits_NV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits in float32 (a copy) after the penalties, logit bias and token mask."""
    scores = logits_NV.to(torch.float32, copy=True)
    for line, row in zip(scores, rows, strict=True):
        penalty = row.params.repetition_penalty
        if penalty != 1.0:
            seen = torch.tensor(sorted(set(row.history)), dtype=torch.long, device=scores.device)
            old = line[seen]
            line[seen] = torch.where(old > 0, old / penalty, old * penalty)
        if row.params.counted and row.generated:
            drawn, counts = zip(*Counter(row.generated).items(), strict=True)
            loss = scores.new_tensor(counts) * row.params.frequency_penalty + row.params.presence_penalty
            line[torch.tensor(drawn, device=scores.device)] -= loss
        if row.params.logit_bias:
            ids, bias = zip(*row.params.logit_bias.items(), strict=True)
            line[torch.tensor(ids, device=scores.device)] += scores.new_tensor(bias)
        if row.allowed is not None:
            line.masked_fill_(~row.allowed, -math.inf)
    return scores


def keep_filtered(scores_NV: Tensor, top_k: Sequence[int], top_p: Sequence[float], min_p: Sequence[float]) -> Tensor:
    """-inf wherever the row's top-k, top-p or min-p excludes the token; float32 scores are changed in place.

    top-k keeps the k largest; top-p the smallest set of most probable tokens whose share of what top-k left is at
    least p; min-p those with at least min_p of the largest probability. Exact: a set of candidates is sorted, and a
    larger one wherever that did not reach p.
    """
    device = scores_NV.device
    vocab = scores_NV.shape[1]
    k_N1 = torch.tensor([k if 0 < k < vocab else vocab for k in top_k], device=device)[:, None]
    if min(top_k, default=0) < vocab and any(0 < k < vocab for k in top_k):
        largest = scores_NV.topk(int(k_N1[k_N1 < vocab].max()), dim=-1).values
        threshold = largest.gather(1, (k_N1 - 1).clamp_max(largest.shape[1] - 1))
        threshold = torch.where(k_N1 < vocab, threshold, -math.inf)
        scores_NV.masked_fill_(scores_NV < threshold, -math.inf)
    if any(p < 1 for p in top_p):
        scores_NV.masked_fill_(scores_NV < _nucleus_threshold(scores_NV, top_p), -math.inf)
    if any(m > 0 for m in min_p):
        log_share = torch.tensor([math.log(m) if m > 0 else -math.inf for m in min_p], device=device)[:, None]
        scores_NV.masked_fill_(scores_NV < scores_NV.amax(-1, keepdim=True) + log_share, -math.inf)
    return scores_NV


def _nucleus_threshold(scores_NV: Tensor, top_p: Sequence[float]) -> Tensor:
    """The smallest score [N, 1] inside the nucleus, -inf for rows with top_p 1."""
    vocab, size = scores_NV.shape[1], _CANDIDATES
    p_N1 = torch.tensor(top_p, dtype=torch.float64, device=scores_NV.device)[:, None]
    threshold = scores_NV.new_full((len(top_p), 1), -math.inf)
    open_rows = (p_N1[:, 0] < 1).nonzero()[:, 0]
    while len(open_rows):
        size = min(vocab, size)
        scores, p = scores_NV[open_rows], p_N1[open_rows]
        largest = scores.topk(size, dim=-1).values
        peak = largest[:, :1]
        share = (largest - peak).exp_().double() / (scores - peak).exp_().sum(-1, keepdim=True).double()
        reached = share.cumsum(-1)
        inside = (reached - share < p).sum(-1, keepdim=True)
        decided = (reached[:, -1] >= p[:, 0]) | (size == vocab)
        threshold[open_rows[decided]] = largest.gather(1, (inside - 1).clamp_min(0))[decided]
        open_rows, size = open_rows[~decided], size * 8
    return threshold


def top_alternatives(logp_NV: Tensor, counts: Sequence[int], tokens: Sequence[int]) -> list[dict[int, float]]:
    """Per row: the `counts[i]` likeliest tokens with their log-probs, likeliest first, and the given token's own."""
    values, ids = logp_NV.topk(max(counts), dim=-1)
    own = logp_NV.gather(1, torch.tensor(tokens, device=logp_NV.device)[:, None])[:, 0]
    columns = zip(counts, tokens, own.tolist(), values.tolist(), ids.tolist(), strict=True)
    return [{**dict(zip(best[:n], logps, strict=False)), token: logp} for n, token, logp, logps, best in columns]


def beam_candidates(logits_NV: Tensor, rows: Sequence[Row], counts: Sequence[int]) -> list[list[Candidate]]:
    """Per row the `counts[i]` best continuations that no mask excludes, best first, for rows of beams.

    The sampling log-prob, which beams are ranked by, is that of the adjusted logits. ModelError-worthy rows (NaN in
    the logits) come back as an empty list.
    """
    result: list[list[Candidate]] = []
    for logits, row, count in zip(logits_NV.split(1), rows, counts, strict=True):
        temperature = policy_temperature(row.params)
        policy = log_softmax(logits, temperature)
        sampling = log_softmax(adjust(logits, [row]), temperature) if row.adjusted else policy
        values, ids = sampling[0].topk(min(count, logits.shape[1]))
        own = policy[0, ids].tolist()
        best = zip(ids.tolist(), values.tolist(), own, strict=True)
        result.append([Candidate(t, s, p) for t, s, p in best if s > -math.inf and not math.isnan(p)])
    return result
