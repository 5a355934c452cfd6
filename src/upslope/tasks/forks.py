"""A process that a user's code forks is the user's: it never goes on with ours."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ending_forks"]


@contextmanager
def ending_forks() -> Iterator[None]:
    """Around a call of a user's code: a forked child that returns or raises ends here, as a program of its own would.

    Without it the child would be a second trainer, or a second reward worker that answers too.
    """
    process = os.getpid()
    raised: BaseException | None = None
    try:
        yield
    except BaseException as error:
        raised = error
        raise
    finally:
        if os.getpid() != process:
            os._exit(_exit_code(raised))


def _exit_code(raised: BaseException | None) -> int:
    if raised is None:
        return 0
    if isinstance(raised, SystemExit) and (raised.code is None or isinstance(raised.code, int)):
        return (raised.code or 0) & 0xFF
    traceback.print_exception(raised)
    return 1
