"""Kill `upslope generate` with SIGKILL at every write, fsync and rename it makes, resume it, compare. A script.

    python kill_generate.py MODEL PROMPTS FOLDER

A write that kills has written half of its bytes. Prints how many kills there were, and how many of the resumed runs
found rows, as one line of JSON; exits 1 when a row was lost or an ending differs from that of a run never stopped.
Children are forked from a process that has the model and runs on one thread.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from upslope.build import load_inference
from upslope.commands import generate
from upslope.options import GenerateOptions


def die_at_call(number: int) -> None:
    """SIGKILL this process in the `number`-th call of write, fsync and replace."""
    calls = itertools.count(1)
    write, fsync, replace = os.write, os.fsync, os.replace

    def deadly_write(descriptor: int, data: Any) -> int:
        if next(calls) == number:
            write(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data)

    def deadly(original: Any) -> Any:
        def call(*args: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        return call

    os.write, os.fsync, os.replace = deadly_write, deadly(fsync), deadly(replace)


def child(model: str, prompts: str, output: Path, die_at: int | None) -> int:
    """Run or resume in a forked process; its exit code, negative when it was killed."""
    pid = os.fork()
    if not pid:
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            if die_at is not None:
                die_at_call(die_at)
            options = {"max_tokens": 12, "max_batch": 2, "num_return_sequences": 2, "dtype": "float32", "resume": True}
            generate.run(GenerateOptions(model=model, prompts=prompts, output=str(output), **options))
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def main(model: str, prompts: str, folder: Path) -> None:
    torch.set_num_threads(1)
    policy = load_inference(model, dtype="float32")
    generate.load_inference = lambda *_, **__: policy
    reference = folder / "reference.jsonl"
    assert child(model, prompts, reference, None) == 0
    whole = reference.read_bytes()
    kills = resumed = 0
    for die_at in range(1, 1000):
        output = folder / f"{die_at}.jsonl"
        code = child(model, prompts, output, die_at)
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        kills += 1
        left = output.read_bytes() if output.exists() else b""
        assert whole.startswith(left), f"{output}: other rows than those of the run that was never stopped"
        rows = left.count(b"\n")
        resumed += rows > 0
        assert child(model, prompts, output, None) == 0
        assert output.read_bytes() == whole, f"{output}: another ending"
    print(json.dumps({"kills": kills, "resumed_with_rows": resumed}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
