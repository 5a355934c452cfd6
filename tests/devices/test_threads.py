"""Work on a thread of its own: what comes back, and that nothing stays."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from upslope.devices.hardware import apart

COUNT = """
import os, time, torch
from upslope.devices.hardware import apart

def compute():
    return torch.ones(1000, 1000).add(1).sum().item()

def more_than(before, seconds):
    until = time.monotonic() + seconds
    while (now := len(os.listdir("/proc/self/task"))) > before and time.monotonic() < until:
        time.sleep(0.01)
    return now - before

torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
assert apart(compute) == 2e6
print(more_than(before, 30))
compute()
print(more_than(before, 0.2))
"""


def test_what_comes_back() -> None:
    threads = []
    assert apart(lambda: threads.append(threading.current_thread()) or "done") == "done"
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
def test_what_is_raised(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        apart(fail)
    assert caught.value is error


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_the_threads_that_torch_computes_with_end_too(root: Path) -> None:
    """In a thread that goes on living they stay, which is what `apart` is for."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    environment.pop("OMP_NUM_THREADS", None)
    found = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["0", "2"]
