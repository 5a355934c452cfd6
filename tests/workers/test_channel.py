"""The messages between trainer and worker: whole and in order, or an error; never a wait for the rest."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.workers.process import TOKEN_BYTES, Channel, Garbled, wait

TOKEN = bytes(range(TOKEN_BYTES))


class Recorder:
    """Stands for a socket whose bytes come and go in pieces of the test's choice."""

    def __init__(self, arriving: bytes = b"", piece: int = 1 << 20) -> None:
        self.arriving, self.piece, self.sent = arriving, piece, b""

    def send(self, data: bytes) -> int:
        self.sent += data[: self.piece]
        return min(self.piece, len(data))

    def recv(self, size: int) -> bytes:
        size = min(size, self.piece)
        chunk, self.arriving = self.arriving[:size], self.arriving[size:]
        return chunk


def sent(messages: list[tuple[int, bytes]], piece: int = 1 << 20) -> bytes:
    recorder = Recorder(piece=piece)
    channel = Channel(recorder, TOKEN)  # type: ignore[arg-type]
    for number, message in messages:
        channel.put(number, message)
    while channel.unsent:
        channel.flush()
    return recorder.sent


def taken(data: bytes, piece: int = 1 << 20) -> list[tuple[int, bytes]]:
    """All messages up to the end; Garbled where there is something else."""
    channel = Channel(Recorder(data, piece), TOKEN)  # type: ignore[arg-type]
    found = []
    while True:
        while (message := channel.take()) is not None:
            found.append(message)
        try:
            channel.fill()
        except EOFError:
            return found


messages = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.binary(max_size=200)), max_size=5)


@given(messages, st.integers(1, 300), st.integers(1, 300))
def test_messages_arrive_whole_and_in_order_in_whatever_pieces(
    given_messages: list[tuple[int, bytes]], out: int, back: int
) -> None:
    assert taken(sent(given_messages, out), back) == given_messages


@given(messages, st.binary(min_size=TOKEN_BYTES), st.integers(0, 10_000))
def test_rubbish_anywhere_is_found(given_messages: list[tuple[int, bytes]], rubbish: bytes, place: int) -> None:
    """What comes before it is right; nothing that was not sent is ever taken."""
    data = sent(given_messages)
    place %= len(data) + 1
    try:
        found = taken(data[:place] + rubbish + data[place:])
    except Garbled:
        return
    assert found == given_messages[: len(found)]


@given(st.binary(min_size=1, max_size=400))
def test_rubbish_alone_is_found_or_incomplete(rubbish: bytes) -> None:
    try:
        assert taken(rubbish) == []
    except Garbled:
        return
    assert TOKEN.startswith(rubbish[:TOKEN_BYTES])


@given(st.binary(min_size=1, max_size=50), st.integers(0, 10_000), st.integers(1, 255))
def test_no_changed_byte_goes_unseen(message: bytes, place: int, change: int) -> None:
    """In the number too: an answer with another number is another job's."""
    data = bytearray(sent([(7, message)]))
    data[place % len(data)] ^= change
    try:
        found = taken(bytes(data))
    except Garbled:
        return
    assert found == []  # the length says more than came


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    ours, theirs = (Channel(end, TOKEN) for end in ends)
    yield ours, theirs
    ours.close()
    theirs.close()


def test_neither_sending_nor_receiving_waits(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    ours.fill()
    assert ours.take() is None
    theirs.put(1, b"x" * 10_000_000)
    theirs.flush()
    assert theirs.unsent
    started = time.monotonic()
    assert wait([theirs], 0.2) == []
    assert 0.2 <= time.monotonic() - started < 5
    for _ in range(10_000):
        if theirs.unsent:
            wait([theirs], 0)
        wait([ours], 0)
        ours.fill()
        if (message := ours.take()) is not None:
            break
    assert message == (1, b"x" * 10_000_000)
    assert not ours.unread


def test_an_end_that_is_gone_can_be_read_and_says_so(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    theirs.close()
    ours.put(1, b"a job")
    assert wait([ours], 10) == [ours]
    assert not ours.unsent
    with pytest.raises((EOFError, OSError)):
        ours.fill()
