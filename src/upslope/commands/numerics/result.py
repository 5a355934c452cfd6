"""What a check returns."""

from collections.abc import Callable
from typing import NamedTuple


class Finding(NamedTuple):
    """Whether a check holds, and the figure that says so."""

    passed: bool
    detail: str


CheckFunction = Callable[[], Finding]


def at_most(value: float, bound: float, what: str) -> Finding:
    """Passed when `value` (NaN never is) does not exceed `bound`."""
    return Finding(value <= bound, f"{what} {value:.2g} (at most {bound:.2g})")
