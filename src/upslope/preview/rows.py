"""What the model will see of the data, for people: which tokens are trained on, and how long the sequences are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from upslope.types import Example

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE, BORDER = "⟦", "⟧", "·"


def mask_view(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Every token of an example, trained ones bold green between ⟦ and ⟧, others dim; "·" stands between tokens.

    The brackets tell them apart where there is no colour; `str(mask_view(...))` is that text.
    """
    from rich.text import Text

    view = Text()
    shown = [_shown(token, tokenizer) for token in example.tokens]
    for trained, run in groupby(zip(example.mask, shown, strict=True), key=lambda pair: bool(pair[0])):
        pieces = [piece for _, piece in run]
        if trained:
            view.append(OPEN + BORDER.join(pieces) + CLOSE, style="bold green")
        else:
            view.append(BORDER.join(pieces), style="dim")
    return view


def _shown(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode([token])
    if "\ufffd" in text or not text:  # part of a character, or a token that is no text by itself
        text = str(tokenizer.convert_ids_to_tokens(token))
    return text.replace("\r", "␍").replace("\t", "⇥").replace("\n", "⏎\n")


@dataclass(frozen=True, slots=True)
class DataStatistics:
    """Sizes of a list of examples. `histogram`: (lowest length, highest length, number of sequences) per bin."""

    sequences: int
    tokens: int
    trained: int
    shortest: int
    mean: float
    longest: int
    histogram: list[tuple[int, int, int]]

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens."""
        return self.trained / self.tokens

    def __str__(self) -> str:
        most = max(count for _, _, count in self.histogram)
        width = len(str(self.longest))
        bars = [
            f"  {low:>{width}}-{high:<{width}} {'█' * round(30 * count / most):<30} {count}"
            for low, high, count in self.histogram
        ]
        return "\n".join(
            [
                f"{self.sequences:,} sequences, {self.tokens:,} tokens, {self.trained:,} trained "
                f"({100 * self.trained_share:.1f}%)",
                f"length {self.shortest} to {self.longest}, mean {self.mean:.1f}",
                *bars,
            ]
        )


def statistics(examples: Sequence[Example], *, bins: int = 8) -> DataStatistics:
    """Length histogram (at most `bins` equally wide bins) and trained share. Raises ValueError without examples."""
    if not examples or bins < 1:
        raise ValueError(f"statistics: {len(examples)} examples in {bins} bins")
    lengths = [len(example.tokens) for example in examples]
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // bins)
    histogram = []
    for start in range(low, high + 1, width):
        end = min(start + width - 1, high)
        histogram.append((start, end, sum(start <= length <= end for length in lengths)))
    return DataStatistics(
        sequences=len(examples),
        tokens=sum(lengths),
        trained=sum(sum(map(bool, example.mask)) for example in examples),
        shortest=low,
        mean=sum(lengths) / len(lengths),
        longest=high,
        histogram=histogram,
    )
