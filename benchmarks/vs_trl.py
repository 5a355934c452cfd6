"""Seconds and memory of whole training steps beside TRL's, and of rollouts beside vLLM's, on the same work.

    python benchmarks/vs_trl.py --json                    every case, three pairs each (hours: TRL needs minutes a step)
    python benchmarks/vs_trl.py --only fixed --pairs 5    one case
    python benchmarks/vs_trl.py --report                  the figures again, from the stored results
    python benchmarks/vs_trl.py --quick --threads 1       a tiny random model: does everything start?

Cases: fixed (the end of sequence ignored: equal work to the token) and natural (not ignored) against tuned TRL 1.16;
default against TRL 1.16 as it comes; ppo against TRL 1.12's PPOTrainer; vllm: rollouts with log-probs.

Ours and theirs run in turn, each in its own process and virtual environment (those of the peers are made here), from
the same weights, prompts, reward function and learning rate, at temperature 1, with one optimizer step of 64 samples.
A pair is one process of each; each process makes warm-up steps first, which are dropped.

rollout: until the completions exist, tokenization and decoding included. update: everything else but the reward.
Speed ratios are theirs / ours in seconds, the memory ratio is ours / theirs, of the largest resident memory.

TRL in its defaults runs in bf16 autocast, with gradient checkpointing, eight samples a micro-batch and generation by
transformers. Changed for a CPU: `use_cpu`. Set to the work: the lengths, group size, 64 samples a step (by gradient
accumulation), learning rate and its constant schedule; no tracker, no checkpoint. "Tuned" is the fastest in a first
look of one step each: checkpointing off; float32, autocast or bf16 weights; then continuous batching; then the whole
step as one micro-batch. Among those within 3% of the fastest the one with least memory is taken. PPO and vLLM are tuned
in the same way. The choice is stored with the results and made anew with --look.

Results go to benchmarks/results/<machine>/vs_trl.json after every pair. The last line holds the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine
from benchmarks.environments import bench_home
from benchmarks.speed import report, runner

NAME = "vs_trl"
GRPO = {"kind": "grpo", "num_prompts": 8, "num_generations": 8, "max_completion_length": 96, "learning_rate": 1e-6}
PPO = {
    "kind": "ppo",
    "num_prompts": 64,
    "num_generations": 1,
    "max_completion_length": 53,
    "learning_rate": 3e-6,
    "num_epochs": 4,
    "kl_coef": 0.05,
    "fixed": True,
}
"""Length, epochs, learning rate and KL are the defaults of TRL's PPOConfig."""
ROLLOUT = {
    "kind": "rollout",
    "num_prompts": 64,
    "num_generations": 1,
    "prompt_length": 48,
    "max_completion_length": 64,
    "fixed": True,
}
CASES: dict[str, dict[str, Any]] = {
    "fixed": {"peer": "trl", "work": {**GRPO, "fixed": True}, "tuned": True},
    "natural": {"peer": "trl", "work": {**GRPO, "fixed": False}, "tuned": True},
    "default": {"peer": "trl", "work": {**GRPO, "fixed": True}, "tuned": False},
    "ppo": {"peer": "trl-ppo", "work": PPO, "tuned": True},
    "vllm": {"peer": "vllm", "work": ROLLOUT, "tuned": True},
}
CONTINUOUS = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"page_size": 128, "num_blocks": 80, "max_batch_tokens": 2048},
}
"""A cache for 64 sequences of up to 128 tokens; TRL's own choice is half of the free memory."""
SMALL = {"num_prompts": 4, "num_generations": 2, "max_completion_length": 8}
"""The quick run's work."""


def look_options(peer: str, looks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Candidates of the first look, each chosen after those before it have been measured (`looks` grows meanwhile)."""
    if peer == "trl-ppo":
        yield from ({"precision": name} for name in ("float32", "autocast", "bfloat16"))
    elif peer == "vllm":
        yield from ({"enforce_eager": eager} for eager in (False, True))
    else:
        plain = {"gradient_checkpointing": False}
        yield {**plain, "bf16": False}
        yield {**plain, "bf16": True}
        yield {**plain, "bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}}
        yield {**report.best(looks)["options"], **CONTINUOUS}
        yield {**report.best(looks)["options"], "per_device_train_batch_size": 64}


class Benchmark:
    """One invocation: its results so far, and how to run a case."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        stored = self.load()
        self.data: dict[str, Any] = stored or {"looks": {}, "cases": {}}

    @property
    def _quick_file(self) -> Path:
        return bench_home() / f"{NAME}_quick.json"

    def load(self) -> dict[str, Any] | None:
        """What is stored, or None."""
        if not self.arguments.quick:
            return machine.load(NAME)
        return json.loads(self._quick_file.read_text()) if self._quick_file.is_file() else None

    def save(self) -> None:
        """Keep the results; those of a quick run outside the repository."""
        cases = self.data["cases"]
        self.data["report"] = [report.case_report(name, cases[name]) for name in CASES if name in cases]
        self.data["ratios"] = report.ratios(cases)
        if self.arguments.quick:
            self._quick_file.parent.mkdir(parents=True, exist_ok=True)
            self._quick_file.write_text(machine.compact(self.data))
        else:
            machine.save(NAME, self.data)

    def settings(self, case: str) -> dict[str, Any]:
        """What both workers of a case are asked."""
        a = self.arguments
        asked = {"warmup": a.warmup, "steps": a.steps, "threads": a.threads, "seed": 0, "options": {}}
        asked |= CASES[case]["work"]
        if a.quick:
            asked |= {name: min(size, asked[name]) for name, size in SMALL.items()}
        policy = runner.policy_folder(quick=a.quick)
        asked["model"] = str(policy)
        if asked["kind"] == "ppo":
            asked["reward_model"] = str(runner.reward_folder(policy))
        return asked

    def with_prompts(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Rollouts get their token ids in the settings."""
        if asked["kind"] != "rollout":
            return asked
        return {**asked, "prompts": runner.rollout_prompts(asked, Path(asked["model"]))}

    def tuned_options(self, case: str) -> dict[str, Any]:
        """The peer's best options on this machine: those stored, or found by a first look of one step each."""
        peer = CASES[case]["peer"]
        stored = self.data["looks"].get(peer)
        if stored and stored["threads"] == self.arguments.threads and not self.arguments.look:
            return stored["chosen"]
        fixed_case = "fixed" if peer == "trl" else case
        asked = self.settings(fixed_case)
        # a rollout is short and its first round compiles; a training step is looked at cold
        asked |= {"steps": 1, "warmup": 1 if peer == "vllm" else 0}
        if asked["kind"] == "ppo":
            asked["num_epochs"] = 1
        looks: list[dict[str, Any]] = []
        limit_s = None
        for options in look_options(peer, looks):
            tried: dict[str, Any] = {"options": options}
            try:
                result = runner.run_peer(peer, self.with_prompts({**asked, "options": options}), limit_s=limit_s)
                last = result["steps"][-1]
                full = set(last["lengths"]) == {asked["max_completion_length"]}
                tried |= {"seconds": last["seconds"], "peak_memory_gb": last["peak_memory_gb"]}
                if not full:
                    tried["error"] = f"completions of {sorted(set(last['lengths']))} tokens where all must be full"
            except runner.WorkerFailed as error:
                tried["error"] = str(error)[-600:]
            looks.append(tried)
            ran = [look["seconds"] for look in looks if "error" not in look]
            limit_s = 600 + 4 * min(ran) if ran else None  # a candidate this slow has lost
            say(f"first look at {peer}: {json.dumps(tried)}")
        chosen = report.best(looks)["options"]
        self.data["looks"][peer] = {"threads": self.arguments.threads, "chosen": chosen, "looks": looks}
        self.save()
        return chosen

    def run(self, case: str) -> None:
        """All pairs of a case, stored after each; a peer that does not install or start leaves a reason."""
        known, a = CASES[case], self.arguments
        asked = self.settings(case)
        entry: dict[str, Any] = {
            "peer": " ".join(runner.PEERS[known["peer"]]["requirements"]),
            "kind": asked["kind"],
            "machine": machine.machine(),
            "threads": a.threads,
            "warmup": a.warmup,
            "work": {k: v for k, v in asked.items() if k not in ("model", "reward_model", "options")},
            "model": Path(asked["model"]).name,
            "pairs": [],
        }
        try:
            entry["peer_options"] = self.tuned_options(case) if known["tuned"] else {}
            for place in range(a.pairs):
                ours = runner.run_ours(self.with_prompts(asked))
                theirs = runner.run_peer(known["peer"], self.with_prompts({**asked, "options": entry["peer_options"]}))
                runner.check_equal_work(ours, theirs, asked)
                entry["pairs"].append({"ours": ours, "theirs": theirs})
                self.data["cases"][case] = entry
                self.save()
                found = report.ratio(entry["pairs"][-1], "seconds", a.warmup)
                say(f"{case}: pair {place + 1} of {a.pairs}: {found:.2f}x")
        except (subprocess.CalledProcessError, RuntimeError) as error:
            if known["peer"] != "vllm" or getattr(error, "module", "").endswith(runner.OURS):
                raise
            entry["missing"] = f"vLLM did not install or start here: {str(error)[-600:]}"
            self.data["cases"][case] = entry
            self.save()


def say(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON line per case on standard output")
    parser.add_argument("--only", choices=CASES, action="append", help="only this case (may be repeated)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of processes per case (default 3)")
    parser.add_argument("--steps", type=int, default=1, help="measured steps per process (default 1)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them that do not count (default 1)")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="of both sides (default: all cores)")
    parser.add_argument("--look", action="store_true", help="tune the peers anew")
    parser.add_argument("--quick", action="store_true", help="a tiny random model; stored outside the repository")
    parser.add_argument("--report", action="store_true", help="run nothing: print from the stored results")
    arguments = parser.parse_args()
    if min(arguments.pairs, arguments.steps, arguments.threads) < 1 or arguments.warmup < 0:
        parser.error("--pairs, --steps and --threads must be at least 1, --warmup at least 0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    benchmark = Benchmark(arguments)
    cases = arguments.only or list(CASES)
    if not arguments.report:
        for case in cases:
            benchmark.run(case)
    stored = benchmark.data["cases"]
    for case in cases:
        if case in stored:
            line = report.case_report(case, stored[case])
            print(json.dumps(line) if arguments.json else report.table(line), flush=True)
    shown = {case: stored[case] for case in cases if case in stored}
    print(json.dumps({"ratios": report.ratios(shown)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
