"""Threads that leave nothing behind."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def apart(function: Callable[[], T]) -> T:
    """What `function` returns or raises, computed on a thread of its own that has ended since.

    For work beside a thread that computes all the time. OpenMP gives every thread that computes a team, which lasts as
    long as the thread. Where all teams together have more members than there are processors, GNU's runtime puts a
    waiting member to sleep at once, busy team or not, and waking it takes longer than most of decoding's operations.
    """
    result: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            result.append(function())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, name="apart", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return result[0]
