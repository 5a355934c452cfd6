"""Scalar heads over a network's hidden states: the value of a state, the reward of a text.

Shapes: N rows, D width.
"""

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """One number per hidden state, computed in float32: [N, D] -> [N].

    Starts at zero, so that a fresh critic says V = 0 everywhere and the first advantages are the returns. The weight
    has the name and shape [1, D] of Hugging Face's sequence classifiers with one label, so that a reward model's head
    loads as a critic's.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move with the model, but stay in float32 (or float64): a value is a regression target, not a logit."""
        super()._apply(fn, recurse)
        for parameter in self.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        return self

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Row by row, as a sum of products: independent of how many rows there are."""
        weight = self.score.weight
        return (hidden_ND.to(weight.dtype) * weight[0]).sum(-1) + self.score.bias
