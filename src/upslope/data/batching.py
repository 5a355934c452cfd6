"""Examples to packed batches, micro-batches under a token budget, the order in which data is met, and masked tokens.

Everything here is a pure function of its arguments: which sequences share a micro-batch never changes a gradient, and
which item stands at a position of the data order, and what is masked of it, follows from (seed, position) alone, so a
run resumes exactly. Of numpy's Philox generator only raw outputs are used, which it keeps unchanged between versions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from upslope.types import Batch, Example

if TYPE_CHECKING:
    from torch import Tensor

_WORD = 2**64 - 1


def collate(
    examples: Sequence[Example],
    *,
    share_prompts: bool = False,
    feed_last: bool = True,
    device: str | torch.device = "cpu",
) -> Batch:
    """Lay examples end to end as one packed Batch (T tokens in all, N of them trained).

    rows_N is the row of the token before each trained token, whose output predicts it. With `share_prompts`, what
    comes before the first trained token is laid down once for all examples in which it is the same. Without
    `feed_last` each example's last token is only predicted, which is all that a loss over tokens needs: it follows no
    other, and ends_B is None. `fields` are concatenated to [N] tensors: int64 where every value is an integer, else
    float32 (a tensor keeps its own floating type). Raises ValueError for lengths that do not fit each other, a trained
    first token, or examples whose fields differ.
    """
    if not examples:
        raise ValueError("collate: no examples")
    for index, example in enumerate(examples):
        _check(index, example, examples[0], feed_last=feed_last)
    layout = _Layout()
    prompts = [
        tuple(example.tokens[: next((t for t, flag in enumerate(example.mask) if flag), 0)]) if share_prompts else ()
        for example in examples
    ]
    counts = Counter(prompts)
    places = [
        layout.add(example.tokens if feed_last else example.tokens[:-1], prompt if counts[prompt] > 1 else ())
        for example, prompt in zip(examples, prompts, strict=True)
    ]
    trained = [(i, t) for i, example in enumerate(examples) for t, flag in enumerate(example.mask) if flag]
    whole = partial(torch.tensor, dtype=torch.int64, device=device)
    return Batch(
        tokens_T=whole(layout.tokens),
        positions_T=whole(layout.positions),
        lengths=layout.lengths,
        parents=layout.parents,
        rows_N=whole([places[i][t - 1] for i, t in trained]),
        targets_N=whole([examples[i].tokens[t] for i, t in trained]),
        sequence_N=whole([i for i, _ in trained]),
        ends_B=whole([place[-1] for place in places]) if feed_last else None,
        fields={name: _field([e.fields[name] for e in examples], name).to(device) for name in examples[0].fields},
    )


@dataclass(slots=True)
class _Layout:
    """Segments laid end to end so far."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    shared: dict[tuple[int, ...], tuple[int, int]] = field(default_factory=lambda: {(): (0, -1)})

    def add(self, tokens: Sequence[int], prompt: tuple[int, ...]) -> list[int]:
        """Lay down a sequence, its shared prompt only if it is new; returns the row of each of its tokens."""
        if prompt not in self.shared:
            self.shared[prompt] = self._segment(prompt, 0, -1)
        start, parent = self.shared[prompt]
        place = list(range(start, start + len(prompt)))
        if rest := tokens[len(prompt) :]:
            first, _ = self._segment(rest, len(prompt), parent)
            place += range(first, first + len(rest))
        return place

    def _segment(self, tokens: Sequence[int], position: int, parent: int) -> tuple[int, int]:
        first = len(self.tokens)
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        self.lengths.append(len(tokens))
        self.parents.append(parent)
        return first, len(self.lengths) - 1


def _check(index: int, example: Example, first: Example, *, feed_last: bool) -> None:
    length, trained = len(example.tokens), sum(map(bool, example.mask))
    if length == 0:
        raise ValueError(f"collate: example {index} has no tokens")
    if length == 1 and not feed_last:
        raise ValueError(f"collate: example {index} has one token, and the last one is not fed")
    if len(example.mask) != length:
        raise ValueError(f"collate: example {index} has {length} tokens but a mask of {len(example.mask)}")
    if example.mask[0]:
        raise ValueError(f"collate: example {index} trains on its first token, which nothing predicts")
    if example.fields.keys() != first.fields.keys():
        raise ValueError(f"collate: example {index} has fields {sorted(example.fields)}, not {sorted(first.fields)}")
    for name, values in example.fields.items():
        if len(values) != trained:
            raise ValueError(f"collate: example {index}: {len(values)} values of {name!r} for {trained} trained tokens")


def _field(parts: Sequence[Any], name: str) -> Tensor:
    """Per-trained-token values of all examples as one [N] tensor."""
    tensors = [_values(part, name) for part in parts]
    floating = (t.dtype for t in tensors if t.is_floating_point())
    # an example without trained tokens says nothing about the type
    kind = max(floating, key=lambda dtype: dtype.itemsize, default=torch.int64)
    return torch.cat([tensor.to(kind) for tensor in tensors])


def _values(part: Any, name: str) -> Tensor:
    if isinstance(part, torch.Tensor):
        values = part
    elif all(isinstance(value, (int, np.integer)) for value in part):
        values = torch.tensor([int(value) for value in part], dtype=torch.int64)
    else:
        values = torch.tensor([float(value) for value in part], dtype=torch.float32)
    if values.dim() != 1:
        raise ValueError(f"collate: field {name!r} must be one value per trained token, has shape {list(values.shape)}")
    return values


def split_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group sequences (by index) into micro-batches of at most `budget` tokens, without padding.

    Like lengths meet: the sequences are sorted, longest first (ties by index), and cut into consecutive groups, as few
    as the budget allows, with the fullest group as small as that number permits. A sequence longer than the budget is
    a group of its own. Every index occurs exactly once; the result depends on nothing but the arguments.
    Raises ValueError for a budget below 1 or a length below 1.
    """
    if budget < 1:
        raise ValueError(f"split_by_tokens: the budget is {budget} tokens; it must be at least 1")
    if any(length < 1 for length in lengths):
        raise ValueError(f"split_by_tokens: a length is {min(lengths)}; every sequence has at least 1 token")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    alone = [[index] for index in order if lengths[index] > budget]
    if not (rest := [index for index in order if lengths[index] <= budget]):
        return alone
    fewest = len(_cut(rest, lengths, budget))
    limits = range(lengths[rest[0]], budget)
    few = bisect_left(limits, True, key=lambda limit: len(_cut(rest, lengths, limit)) <= fewest)
    return alone + _cut(rest, lengths, limits.start + few)


def _cut(order: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    groups: list[list[int]] = []
    room = 0
    for index in order:
        if lengths[index] > room:
            groups.append([])
            room = limit
        groups[-1].append(index)
        room -= lengths[index]
    return groups


def data_order(n: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n), a pure function of (n, seed, epoch).

    Items are sorted by the raw 64-bit outputs of a Philox counter generator keyed with (seed, epoch) (Salmon et al.
    2011), so the order is stable across versions and machines. Raises ValueError for n < 0 or epoch < 0.
    """
    if n < 0 or epoch < 0:
        raise ValueError(f"data_order: n={n} and epoch={epoch} must not be negative")
    return np.argsort(_raw(n, seed, epoch), kind="stable").tolist()


def _raw(n: int, *key: int) -> np.ndarray:
    """The first n outputs of a Philox generator with this key of two numbers."""
    return np.random.Philox(key=np.array([part & _WORD for part in key], dtype=np.uint64)).random_raw(n)


@dataclass(slots=True)
class PromptStream:
    """An endless order over n items: epoch after epoch, each a new permutation.

    `at(position)` is a pure function of (n, seed, position); `position` is the cursor that `take` moves and that a
    checkpoint stores. Raises ValueError for n < 1 or a negative position.
    """

    n: int
    seed: int
    position: int = 0
    _order: tuple[int, list[int]] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.n < 1 or self.position < 0:
            raise ValueError(f"PromptStream: n={self.n} must be at least 1 and position={self.position} at least 0")

    def at(self, position: int) -> int:
        """The item at a position of the endless order."""
        if position < 0:
            raise ValueError(f"PromptStream: position {position} is negative")
        epoch, offset = divmod(position, self.n)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, data_order(self.n, seed=self.seed, epoch=epoch))
        return self._order[1][offset]

    def take(self, count: int) -> list[int]:
        """The next `count` items; the cursor moves behind them."""
        if count < 0:
            raise ValueError(f"PromptStream: cannot take {count} items")
        items = [self.at(self.position + step) for step in range(count)]
        self.position += count
        return items

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint stores."""
        return {"n": self.n, "seed": self.seed, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken. Raises ValueError when it belongs to other data or another seed."""
        for name, ours in (("n", self.n), ("seed", self.seed)):
            if state[name] != ours:
                raise ValueError(f"PromptStream: the stored {name} is {state[name]}, this run's is {ours}")
        self.position = state["position"]


def padded_from_flat(values_N: Tensor, sequence_N: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Per-trained-token values [N] as [B, T] rows, one per sequence, with their mask [B, T].

    B is `num_sequences`, T the largest number of trained tokens of a sequence; a row's values stand at its left, zeros
    (mask False) follow. Untrained tokens between trained ones leave no gap. Differentiable in the values. Raises
    ValueError when the shapes differ, or sequence_N descends or leaves 0..B-1.
    """
    if values_N.dim() != 1 or values_N.shape != sequence_N.shape:
        raise ValueError(f"padded_from_flat: shapes {list(values_N.shape)} and {list(sequence_N.shape)} differ")
    count = sequence_N.shape[0]
    if count and (bool((sequence_N[1:] < sequence_N[:-1]).any()) or not 0 <= int(sequence_N[0]) <= int(sequence_N[-1])):
        raise ValueError("padded_from_flat: sequence_N must ascend from 0")
    if count and int(sequence_N[-1]) >= num_sequences:
        raise ValueError(f"padded_from_flat: sequence {int(sequence_N[-1])} of only {num_sequences}")
    counts_B = torch.bincount(sequence_N, minlength=num_sequences)
    mask_BT = torch.arange(int(counts_B.max()) if num_sequences else 0, device=values_N.device) < counts_B[:, None]
    return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N), mask_BT


def flat_from_padded(padded_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The inverse of `padded_from_flat`: the values under the mask, row by row, as [N]. Raises ValueError on shapes."""
    if padded_BT.shape != mask_BT.shape or mask_BT.dtype != torch.bool:
        shapes = f"{list(padded_BT.shape)} and mask {list(mask_BT.shape)} ({mask_BT.dtype})"
        raise ValueError(f"flat_from_padded: values {shapes} do not fit")
    return padded_BT[mask_BT]


@dataclass(frozen=True, slots=True)
class Masking:
    """Which tokens the masked objective hides, and what it puts in their place (Devlin et al. 2019, arXiv 1810.04805).

    Of the chosen tokens 80% become [MASK], 10% another token, 10% stay: the network cannot know which ones it is asked
    for. The choice is a pure function of (seed, counter).

    probability: share of the tokens chosen. words: the ids that may stand in for a token. keep: never chosen.
    """

    probability: float
    mask_id: int
    words: Sequence[int]
    keep: Container[int]
    seed: int

    def apply(self, tokens: Sequence[int], counter: int) -> tuple[list[int], list[int]]:
        """The tokens with some replaced, and the places chosen, ascending; at least one where any may be."""
        raw = _raw(3 * len(tokens), self.seed, counter)
        choose, how = (raw[: 2 * len(tokens)] >> np.uint64(11)).reshape(2, -1) * 2.0**-53
        free = [t for t, token in enumerate(tokens) if token not in self.keep]
        places = [t for t in free if choose[t] < self.probability]
        if free and not places:
            places = [min(free, key=lambda t: choose[t])]
        changed = list(tokens)
        for t in places:
            if how[t] < 0.8:
                changed[t] = self.mask_id
            elif how[t] < 0.9:
                changed[t] = self.words[int(raw[2 * len(tokens) + t]) % len(self.words)]
        return changed, places
