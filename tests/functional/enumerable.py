"""A language model small enough to enumerate: the exact objective and the exact expectation of any estimator.

Vocabulary <= 5, length <= 4, float64. A sequence ends with token 0 (end of sequence) or when it has `length` tokens,
so lengths vary. The policy is a table of logits, one row per prefix. Imports nothing of the package under test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

EOS = 0


@dataclass
class EnumerableLM:
    """All S sequences of a tabular policy, padded to [S, T], and rewards for each of their tokens."""

    vocabulary: int
    length: int
    seed: int = 0
    sequences: list[tuple[int, ...]] = field(init=False)
    prefixes: dict[tuple[int, ...], int] = field(init=False)
    logits: Tensor = field(init=False)

    def __post_init__(self) -> None:
        assert self.vocabulary <= 5
        assert self.length <= 4
        self.sequences, self.prefixes = [], {}
        self._grow(())
        generator = torch.Generator().manual_seed(self.seed)
        self.logits = torch.randn(
            len(self.prefixes), self.vocabulary, generator=generator, dtype=torch.float64
        ).requires_grad_()
        S, T = len(self.sequences), self.length
        self.mask_ST = torch.zeros(S, T, dtype=torch.bool)
        self.tokens_ST = torch.zeros(S, T, dtype=torch.long)
        self.rows_ST = torch.zeros(S, T, dtype=torch.long)
        for s, sequence in enumerate(self.sequences):
            for t, token in enumerate(sequence):
                self.mask_ST[s, t] = True
                self.tokens_ST[s, t] = token
                self.rows_ST[s, t] = self.prefixes[sequence[:t]]
        rewards = torch.randn(len(self.prefixes), self.vocabulary, generator=generator, dtype=torch.float64)
        self.reward_table = rewards
        self.rewards_ST = torch.where(self.mask_ST, rewards[self.rows_ST, self.tokens_ST], torch.nan)

    def _grow(self, prefix: tuple[int, ...]) -> None:
        self.prefixes[prefix] = len(self.prefixes)
        for token in range(self.vocabulary):
            sequence = (*prefix, token)
            if token == EOS or len(sequence) == self.length:
                self.sequences.append(sequence)
            else:
                self._grow(sequence)

    def logp_ST(self, logits: Tensor | None = None, padding: float = math.nan) -> Tensor:
        """Log-prob of each token of each sequence; what is not part of the sequence holds `padding`."""
        table = torch.log_softmax(self.logits if logits is None else logits, dim=-1)
        # padding is added outside the graph, as a real model's padded rows would be finite but meaningless
        return torch.where(self.mask_ST, table[self.rows_ST, self.tokens_ST], padding)

    def logp_S(self, logits: Tensor | None = None) -> Tensor:
        return self.logp_ST(logits, padding=0.0).sum(1)

    def probabilities(self) -> Tensor:
        return self.logp_S().detach().exp()

    def total_rewards(self, gamma: float = 1.0) -> Tensor:
        """R(y) = sum_t gamma^t r_t of every sequence."""
        powers = gamma ** torch.arange(self.length, dtype=torch.float64)
        return torch.where(self.mask_ST, self.rewards_ST * powers, 0.0).sum(1)

    def objective(self, gamma: float = 1.0) -> Tensor:
        """J = E_y[R(y)], differentiable in the logits."""
        return (self.logp_S().exp() * self.total_rewards(gamma)).sum()

    def gradient(self, scalar: Tensor) -> Tensor:
        (result,) = torch.autograd.grad(scalar, self.logits, retain_graph=True)
        return result

    def true_values(self, gamma: float = 1.0) -> Tensor:
        """V(prefix) under the policy, by backward recursion over prefixes, gathered to [S, T] (NaN where masked)."""
        p = torch.softmax(self.logits.detach(), dim=-1)
        value = [0.0] * len(self.prefixes)
        for prefix in sorted(self.prefixes, key=len, reverse=True):
            row = self.prefixes[prefix]
            for token in range(self.vocabulary):
                child = self.prefixes.get((*prefix, token))
                future = 0.0 if child is None else value[child]
                value[row] += float(p[row, token]) * (float(self.reward_table[row, token]) + gamma * future)
        return torch.where(self.mask_ST, torch.tensor(value, dtype=torch.float64)[self.rows_ST], torch.nan)

    def expected_gradient(self, loss_S: Tensor) -> Tensor:
        """E_y[gradient of the loss of y], the probabilities held constant: what sampling estimates."""
        return self.gradient((self.probabilities() * loss_S).sum())

    def reference(self, seed: int = 99) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.logits.shape, generator=generator, dtype=torch.float64)
