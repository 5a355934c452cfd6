"""Run as a script by test_checkpoint_kills.py: saves checkpoints and dies by SIGKILL at chosen system calls.

kill_checkpoints.py points ROOT     one folder ROOT/N-MODE for every call N of a save, killed before or after it
kill_checkpoints.py run ROOT SEED   a tiny training, killed again and again at random calls and times until done
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upslope.runs.folder import Run
from upslope.training import checkpoint
from upslope.training.checkpoint import capture_random_state, restore_random_state
from upslope.types import Prompt, Reward, Rollout, RolloutGroup

STEPS = 12
_CALLS = [(os, name) for name in ("fsync", "rename", "replace", "symlink", "mkdir", "unlink", "rmdir", "write")]


def state_of(step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What the checkpoint of `step` holds in the `points` test."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(5, 7, generator=generator)
    tensors = {
        "policy": {"weight": weight, "half": weight.to(torch.bfloat16), "tied": weight},
        "optimizer": {"step": torch.tensor(step), "bytes": torch.arange(step, dtype=torch.uint8)},
    }
    return tensors, {"step": step, "kl_coef": 0.1 / 3 * step, "seen": [step] * step}


def write_model(folder: Path, step: int) -> None:
    (folder / "config.json").write_text(json.dumps({"step": step}))


def save(folder: Path, step: int, *, best: bool = False) -> None:
    tensors, state = state_of(step)
    checkpoint.save(
        folder, step, tensors=tensors, state=state, write_model=lambda path: write_model(path, step), best=best
    )


def arm(number: int, after: bool) -> None:
    """Dies at the call `number` from now of those that change the disk, before or after it (half done: os.write)."""
    remaining = [number]

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            remaining[0] -= 1
            if remaining[0] == 0:
                if after and real is not os_write:
                    real(*args, **kwargs)
                elif after:
                    os_write(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    os_write, real_save = os.write, checkpoint.save_file

    def save_file(tensors: dict[str, Tensor], path: Path, **kwargs: Any) -> None:
        remaining[0] -= 1
        real_save(tensors, path, **kwargs)
        if remaining[0] == 0:
            if after:
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    for module, name in _CALLS:
        setattr(module, name, wrap(getattr(module, name)))
    checkpoint.save_file = save_file


def child(work: Callable[[], None]) -> int:
    """Runs `work` in a fork; returns the wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def points(root: Path) -> None:
    for after in (False, True):
        for best in (False, True):
            number = 1
            while True:
                folder = root / f"{number}-{'after' if after else 'before'}-{'best' if best else 'last'}"
                save(folder, 1, best=True)

                def work(folder: Path = folder, number: int = number, after: bool = after, best: bool = best) -> None:
                    arm(number, after)
                    save(folder, 2, best=best)

                status = child(work)
                if not os.WIFSIGNALED(status):
                    assert status == 0, status
                    shutil.rmtree(folder)
                    break
                number += 1


def train(folder: Path) -> None:
    """A training in miniature: every generator, an optimizer with momentum, metrics, rollouts, checkpoints."""
    resumed = (folder / "config.toml").is_file()
    run = Run.open(folder) if resumed else Run.create(output_dir=folder, verb="ppo", config_toml="steps = 12\n")
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    weight, momentum, controller, start = torch.zeros(64), torch.zeros(64), 0.1, 0
    found = checkpoint.resume(run.checkpoints, keep_last=2)
    if found is not None:
        resolved, tensors, state = found
        assert not resolved.note, resolved.note
        weight, momentum = tensors["policy"]["weight"], tensors["optimizer"]["momentum"]
        controller, start = state["controller"], state["step"]
        assert restore_random_state(tensors["random"], state["random"]) == []
    run.rewind(start)
    for step in range(start + 1, STEPS + 1):
        gradient = torch.randn(64) + random.random() + np.random.standard_normal()
        momentum = 0.9 * momentum + gradient
        weight = weight - 0.01 * momentum
        controller *= 1.0 + 0.01 * random.gauss(0.0, 1.0)
        run.log(step, {"loss": float(weight.sum()), "controller": controller})
        rollout = Rollout([1], [step], [True], [-1.0], [-1.0], "stop", str(step), 0, reward=Reward(controller))
        run.record_rollouts(step, [RolloutGroup(Prompt(key=step, text="?"), [rollout])])
        run.flush()
        random_tensors, random_json = capture_random_state()
        checkpoint.save(
            run.checkpoints,
            step,
            tensors={"policy": {"weight": weight}, "optimizer": {"momentum": momentum}, "random": random_tensors},
            state={"step": step, "controller": controller, "random": random_json},
            keep_last=2,
            best=step == 5,
        )
    run.summary({"final": controller})
    run.close()


def run_with_kills(root: Path, seed: int) -> None:
    dice = random.Random(seed)
    assert child(lambda: train(root / "straight")) == 0
    kills, folder = 0, root / "killed"
    while True:
        if kills % 3 == 2:
            pid = os.fork()
            if pid == 0:
                train(folder)
                os._exit(0)
            time.sleep(dice.uniform(0.0, 0.12))
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        else:
            number, after = dice.randint(1, 70), dice.random() < 0.5

            def work(number: int = number, after: bool = after) -> None:
                arm(number, after)
                train(folder)

            status = child(work)
        if not os.WIFSIGNALED(status):
            assert status == 0, status
            break
        kills += 1
    print(kills)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # A kill, unlike a power cut, loses nothing that was written; the calls are still counted.
    os.fsync = lambda descriptor: None
    if sys.argv[1] == "points":
        points(Path(sys.argv[2]))
    else:
        run_with_kills(Path(sys.argv[2]), int(sys.argv[3]))
