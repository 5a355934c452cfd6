"""Run a recipe again and again, kill it with SIGKILL at many places, resume it, until it ends. A script of its own.

    python kill_runs.py MODEL TASK FOLDER KILLS

Makes FOLDER/reference (never stopped) and FOLDER/run-0, run-1, ... (killed), until KILLS kills have happened. Half of
them come from the child itself at a random call of fsync, replace or rename, so also between a write and its rename;
the others from outside at a random moment. Prints the kills as one line of JSON. Children are forked from a process
that has imported everything and computed nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from upslope.options import PPOOptions
from upslope.recipes.ppo import ppo


def options(model: str, task: str, folder: Path, *, resume: bool) -> PPOOptions:
    return PPOOptions(
        model=model,
        task=task,
        output_dir=str(folder),
        resume=resume,
        num_train_prompts=20,
        num_prompts=3,
        num_generations=3,
        max_completion_length=4,
        max_steps=6,
        save_every=1,
        eval_every=3,
        eval_samples=4,
        learning_rate=1e-2,
        num_epochs=2,
        num_minibatches=2,
        kl_coef=0.1,
        kl_target=0.5,
        kl_horizon=50,
        critic="separate",
        dtype="bfloat16",
    )


def die_at_call(number: int) -> None:
    """SIGKILL this process when fsync, replace, rename and symlink have been called `number` times."""
    calls = itertools.count(1)

    def deadly(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename", "symlink"):
        setattr(os, name, deadly(getattr(os, name)))


def launch(model: str, task: str, folder: Path, *, die_at: int | None) -> int:
    """Fork a child that runs or resumes the recipe; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = (folder.parent / f"{folder.name}.log").open("a")
        if die_at is not None:
            die_at_call(die_at)
        ppo(options(model, task, folder, resume=(folder / "config.toml").is_file()))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def finish(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def main(model: str, task: str, root: Path, wanted: int) -> None:
    draw = random.Random(7)
    started = time.monotonic()
    if finish(launch(model, task, root / "reference", die_at=None)):
        raise SystemExit((root / "reference.log").read_text())
    duration = time.monotonic() - started
    kills = {"inside": 0, "outside": 0}
    runs = 0
    while sum(kills.values()) < wanted:
        folder, inside = root / f"run-{runs}", True
        for _ in range(200):
            die_at = draw.randint(1, 90) if inside else None
            pid = launch(model, task, folder, die_at=die_at)
            if not inside:
                time.sleep(draw.uniform(0.02, 0.6) * duration)
                os.kill(pid, signal.SIGKILL)
            code = finish(pid)
            if code > 0:
                raise SystemExit((root / f"{folder.name}.log").read_text())
            if code == 0:
                break
            kills["inside" if inside else "outside"] += 1
            inside = not inside
        else:
            raise SystemExit(f"{folder} never ended")
        runs += 1
    print(json.dumps({"kills": kills, "runs": runs, "seconds": duration}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
