"""What people are shown of the data."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from upslope.data.chat import encode_conversation, encode_document
from upslope.preview.dry_run import mask_view, statistics
from upslope.types import Example, Message


def test_mask_view_shows_every_token_and_which_are_trained(chatml: Any) -> None:
    talk = (Message("user", "Hello there"), Message("assistant", "The answer"))
    example = encode_conversation(chatml, talk)
    plain = str(mask_view(example, chatml))
    assert plain.count("⟦") == plain.count("⟧") == 1
    inside = plain[plain.index("⟦") + 1 : plain.index("⟧")]
    assert inside.replace("·", "") == "The answer<|im_end|>"
    assert inside.count("·") == sum(example.mask) - 1
    whole = plain.replace("⟦", "").replace("⟧", "").replace("·", "").replace("⏎\n", "\n")
    assert whole == chatml.decode(example.tokens)
    styles = {plain[span.start : span.end]: span.style for span in mask_view(example, chatml).spans}
    assert styles[f"⟦{inside}⟧"] == "bold green"
    assert set(styles.values()) == {"bold green", "dim"}


def test_mask_view_prints_without_markup_surprises(chatml: Any) -> None:
    example = encode_document(chatml, "a [bold]b[/bold] 日 \t\r\n c")
    out = io.StringIO()
    Console(file=out, width=200).print(mask_view(example, chatml))
    printed = out.getvalue().replace("·", "").replace("⟦", "").replace("⟧", "")
    assert "[bold]b[/bold]" in printed
    assert "⇥" in printed
    assert "␍" in printed
    assert "\ufffd" not in printed  # a part of a character is shown by its token's name


def test_statistics() -> None:
    batch = [Example([1] * n, [False] + [True] * (n // 2) + [False] * (n - n // 2 - 1)) for n in (2, 3, 4, 10)]
    numbers = statistics(batch, bins=3)
    assert (numbers.sequences, numbers.tokens, numbers.trained) == (4, 19, 1 + 1 + 2 + 5)
    assert (numbers.shortest, numbers.mean, numbers.longest) == (2, 4.75, 10)
    assert numbers.trained_share == 9 / 19
    assert numbers.histogram == [(2, 4, 3), (5, 7, 0), (8, 10, 1)]
    assert "4 sequences, 19 tokens, 9 trained (47.4%)" in str(numbers)
    assert statistics(batch[:1]).histogram == [(2, 2, 1)]
    with pytest.raises(ValueError, match=r"0 examples"):
        statistics([])
