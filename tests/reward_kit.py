"""Groups to be judged, what came out, and whether processes are gone."""

from __future__ import annotations

import time
from pathlib import Path

from upslope.types import Prompt, Rollout, RolloutGroup


def group(texts: list[str], key: int = 0, **metadata: object) -> RolloutGroup:
    rollouts = [Rollout([1], [2], [True], [0.0], [0.0], "stop", text, i) for i, text in enumerate(texts)]
    return RolloutGroup(Prompt(key, text="q", metadata=metadata), rollouts)


def values(one: RolloutGroup) -> list[float | None]:
    return [rollout.reward.value for rollout in one.rollouts]


def errors(one: RolloutGroup) -> list[str]:
    return [rollout.reward.error or "" for rollout in one.rollouts]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(*pids: int, within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False
