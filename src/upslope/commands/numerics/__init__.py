"""`upslope doctor --numerics`: the product's own checks, run on the user's machine with the user's torch."""

import time
from collections.abc import Callable
from typing import Any

import torch

from upslope.commands.numerics import maths, networks
from upslope.commands.numerics.result import CheckFunction, Finding

__all__ = ["CHECKS", "run_checks"]

CHECKS: dict[str, CheckFunction] = {**maths.CHECKS, **networks.CHECKS}
"""Every check by name, cheapest first."""


def run_checks(
    announce: Callable[[str], None] = lambda name: None, checks: dict[str, CheckFunction] | None = None
) -> dict[str, Any]:
    """{"passed": n, "failed": n, "checks": [{name, passed, detail, seconds}]}; a check that raises has failed.

    Takes some ten seconds on an idle machine. The global random state is left as it was.
    """
    outcomes: list[dict[str, Any]] = []
    with torch.random.fork_rng(devices=[]):
        for name, check in (CHECKS if checks is None else checks).items():
            announce(name)
            torch.manual_seed(0)
            start = time.perf_counter()
            try:
                finding = check()
            except Exception as error:  # the report is the boundary: whatever a check dies of is its finding
                finding = Finding(False, f"{type(error).__name__}: {' '.join(str(error).split())}")
            seconds = round(time.perf_counter() - start, 3)
            outcomes.append({"name": name, **finding._asdict(), "seconds": seconds})
    passed = sum(outcome["passed"] for outcome in outcomes)
    return {"passed": passed, "failed": len(outcomes) - passed, "checks": outcomes}
