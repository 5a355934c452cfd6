"""Beam search over one request: which continuations live on, which are finished, and when to stop. Free of torch.

Score of a sequence = sum of its log-probs / length ** length_penalty, the end-of-sequence token counted (Wu et al.
2016, arXiv 1609.08144, without the constants). A continuation that ends is kept as finished only if it ranks among
the best `width` of its step, so that a poor early end cannot win by being short; the best `width` that do not end
live on. The search stops when no live beam can still beat the n-th best finished one: with log-probs <= 0 a beam's
best reachable score is bounded by its present sum over the largest (or, for a negative penalty, the next) length.
"""

from dataclasses import dataclass, field

from upslope.engine.request import Request, Sequence
from upslope.types import FinishReason


@dataclass(frozen=True, slots=True)
class Candidate:
    """One continuation of a beam by one token."""

    token: int
    sampling_logprob: float
    policy_logprob: float


@dataclass(slots=True)
class Beam:
    """The beams of one request. `live` maps a beam's sample number to (sequence, sum of log-probs)."""

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
                if not ends:
                    live[len(live)] = (child, -loss)
            else:
                live[len(live)] = (child, -loss)
                survivors.append((parent, child))
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
