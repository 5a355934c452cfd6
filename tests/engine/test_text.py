"""Incremental text: characters across tokens, stop strings across tokens, held-back tails."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from upslope.engine.outputs import TextStream

from .tiny import byte_tokenizer, ids

TOKENIZER = byte_tokenizer()


def run(tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[TextStream, list[str], int]:
    """Push one by one; the stream, the pieces taken, and how many tokens were needed."""
    stream, pieces = TextStream(TOKENIZER, stop), []
    for used, token in enumerate(tokens, 1):
        stopped = stream.push([token])
        pieces.append(stream.take())
        if stopped:
            return stream, pieces, used
    stream.push([], final=True)
    pieces.append(stream.take())
    return stream, pieces, len(tokens)


@settings(max_examples=100)
@given(st.text(alphabet=st.sampled_from("abé€😀 \n中"), max_size=12))
def test_pieces_add_up_and_hold_whole_characters(text: str) -> None:
    stream, pieces, _ = run(ids(text))
    assert "".join(pieces) == stream.text == text
    assert all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=100)
@given(st.lists(st.integers(1, 256), max_size=12))
def test_any_bytes_give_the_text_of_the_whole(tokens: list[int]) -> None:
    stream, pieces, _ = run(tokens)
    assert "".join(pieces) == stream.text == TOKENIZER.decode(tokens, skip_special_tokens=True)


@settings(max_examples=200)
@given(st.text(alphabet="ab€", max_size=14), st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    stop = tuple(stops)
    stream, pieces, used = run(ids(text), stop)
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert (stream.text, stream.stopped) == (text, False)
    else:
        seen = text[: min(ends)]
        assert stream.stopped
        assert used == len(seen.encode())
        assert stream.text == seen[: min(seen.find(s) for s in stop if s in seen)]
    assert "".join(pieces) == stream.text, "streamed text was taken back"


def test_tail_that_may_become_a_stop_string_is_held_back() -> None:
    _, pieces, _ = run(ids("xENyEND!"), ("END",))
    assert pieces == ["x", "", "", "ENy", "", "", ""]


def test_unfinished_character_at_the_end_is_shown_as_such() -> None:
    stream, _, _ = run(ids("a€")[:-1])
    assert stream.text == "a\ufffd"


def test_special_tokens_have_no_text() -> None:
    stream, _, _ = run([*ids("a"), 0, *ids("b")])
    assert stream.text == "ab"


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
def test_pushing_several_at_once_changes_nothing(chunk: int) -> None:
    tokens, stream = ids("größer 😀 than"), TextStream(TOKENIZER)
    for i in range(0, len(tokens), chunk):
        stream.push(tokens[i : i + chunk])
    stream.push([], final=True)
    assert stream.text == "größer 😀 than"
