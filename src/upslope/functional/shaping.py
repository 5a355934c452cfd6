"""From what a judge says about a sequence to rewards along its tokens."""

import torch
from torch import Tensor

from ._checks import as_mask, check_range, check_rank, floats, shape


def at_last_token(scores_B: Tensor, mask_BT: Tensor) -> Tensor:
    """The score of each sequence as the reward of its last sampled token, 0 elsewhere. [B], [B, T] -> [B, T].

    ValueError: shapes do not fit, or a row has no sampled token to carry its score.
    """
    check_rank(2, mask_BT=mask_BT)
    mask_BT = as_mask(mask_BT)
    if tuple(scores_B.shape) != (mask_BT.shape[0],):
        raise ValueError(f"scores_B must have shape [{mask_BT.shape[0]}], got {shape(scores_B)}")
    if not bool(mask_BT.any(1).all()):
        row = int((~mask_BT.any(1)).nonzero()[0])
        raise ValueError(f"row {row} of mask_BT {shape(mask_BT)} has no sampled token to carry its score")
    (scores_B,) = floats(scores_B)
    steps_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B1 = torch.where(mask_BT, steps_T, -1).amax(1, keepdim=True)
    return torch.where(steps_T == last_B1, scores_B.unsqueeze(1), torch.zeros((), dtype=scores_B.dtype).to(scores_B))


def soft_overlong_penalty(length: Tensor | int, max_length: int, cache: int) -> Tensor:
    """0 up to max_length - cache, then linearly down to -1 at max_length, -1 beyond (DAPO, 2503.14476, eq. 13).

    Lengths in tokens, any shape. cache = 0 is the step: 0 up to max_length, -1 beyond.
    ValueError: not 0 <= cache <= max_length.
    """
    check_range(1, max_length=max_length)
    check_range(0, max_length, cache=cache)
    (lengths,) = floats(torch.as_tensor(length))
    if cache == 0:
        return -(lengths > max_length).to(lengths.dtype)
    return ((max_length - cache - lengths) / cache).clamp(-1.0, 0.0)
