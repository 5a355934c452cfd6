"""How near training and decoding come to what this machine can do at most, both measured in the same run.

    python benchmarks/roofline.py --json      SmolLM2-135M: some minutes on two cores
    python benchmarks/roofline.py --profile   where the time of one such update goes; nothing is saved
    python benchmarks/roofline.py --quick     a tiny random network, to see that it runs; nothing is saved

Training: GRPO-like updates (8 prompts x 8 completions of about 24 + 72 tokens, prompts shared), AdamW included, as
multiply-adds executed (counted by part: benchmarks/counting.py) over the matrix rate. Decoding: engine steps, sampling
included, against the larger of matrix time and memory time. Rates are the best of several large products and streams,
measured before, between and after the work. Results: benchmarks/results/<machine>/roofline.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import counting
from benchmarks.machine import machine, save, spread
from benchmarks.workload import Learner, Task, experience, network, spread_lengths
from upslope.engine.engine import Engine
from upslope.models.attention.context import BLOCK
from upslope.models.protocol import CausalModel
from upslope.types import SamplingParams

TARGETS = {"train_share_of_matmul": 0.50, "decode_share_of_roofline": 0.45}
BATCHES = (1, 8, 16, 64)


class Rates:
    """Matrix rates of bfloat16 and float32 and memory bandwidth; every turn is kept, the best of each counts."""

    def __init__(self, device: str, *, quick: bool = False) -> None:
        self.device = device
        self.options: dict[str, Any] = {"device": device, "seconds": 0.02 if quick else 1.0}
        self.shapes = ((256, 256, 256),) if quick else None
        self.size = 2**24 if quick else 2**30 if device == "cpu" else 2**32
        self.turns: list[dict[str, Any]] = []

    def measure(self) -> None:
        """One turn: some ten seconds on two cores."""
        self.turns.append(
            {
                "bfloat16": counting.matrix_rate(torch.bfloat16, shapes=self.shapes, **self.options),
                "float32": counting.matrix_rate(torch.float32, shapes=self.shapes, **self.options),
                "memory": counting.bandwidth(size=self.size, **self.options),
            }
        )

    def matrix(self, dtype: torch.dtype) -> float:
        """Operations a second."""
        return max(turn[str(dtype).removeprefix("torch.")]["operations_per_second"] for turn in self.turns)

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return max(turn["memory"]["bytes_per_second"] for turn in self.turns)

    def summary(self) -> dict[str, Any]:
        """What was measured."""
        best = {name: max(t[name]["operations_per_second"] for t in self.turns) for name in ("bfloat16", "float32")}
        return {**best, "memory": self.bandwidth, "threads": torch.get_num_threads(), "turns": self.turns}


def train(learner: Learner, task: Task, repeats: int) -> dict[str, Any]:
    """Seconds of whole updates on one step's rollouts, and the multiply-adds of one of them."""
    model, device = learner.model, str(learner.model.device)
    held = experience(task.rollout(task.engine(model)))
    batches, _ = held.batches(range(held.size), learner.micro_batch_tokens, device=device)
    seen = counting.products_seen(lambda: learner.update(held))  # the warm-up, too
    seconds = [counting.seconds_of(lambda: learner.update(held), device) for _ in range(repeats)]
    counts = counting.training_counts(
        model,
        batches,
        head_again=counting.head_is_repeated(model),
        moving=lambda batch: (batch.fields["weight"] * batch.fields["advantages"]) != 0,
    )
    packed = sum(sum(batch.lengths) for batch in batches)
    return {
        "seconds": {**spread(seconds), "all": seconds},
        "micro_batches": len(batches),
        "packed_tokens": packed,
        "trained_tokens": held.num_trained,
        "packed_tokens_per_second": packed / statistics.median(seconds),
        "sequence_tokens_per_second": task.tokens / statistics.median(seconds),
        "multiply_adds": counts,
        "multiply_adds_total": sum(counts.values()),
        "products_seen_by_torch": seen,
        "multiply_adds_executed": counting.executed(counts, seen),
    }


def profile(learner: Learner, task: Task) -> str:
    """The operations of a warm update that take the most time of their own, as a table."""
    held = experience(task.rollout(task.engine(learner.model)))
    learner.update(held)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        learner.update(held)
    return seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40)


def share_training(training: dict[str, Any], rate: float) -> dict[str, Any]:
    """What `train` found, with its share of the matrix rate (operations a second)."""
    done = training["multiply_adds_executed"]
    again = sum(n for part, n in training["multiply_adds"].items() if part.endswith("again"))
    shares = spread([2 * done / seconds / rate for seconds in training["seconds"]["all"]])
    without = shares["median"] * (1 - again / done)
    return {**training, "share_of_matmul": shares, "share_without_recomputation": without}


def decode(model: CausalModel, prompts: Sequence[Sequence[int]], steps: int) -> list[tuple[float, list[int]]]:
    """(seconds, keys each row saw) of every engine step that decodes all prompts' rows, sampling included."""
    blocks = sum(1 + -(-(len(p) + steps + 1) // BLOCK) for p in prompts)  # one in reserve, so that none has to wait
    engine = Engine(
        model, max_batch=len(prompts), num_blocks=blocks, prefill_tokens=sum(map(len, prompts)), prefix_cache=False
    )
    for key, prompt in enumerate(prompts):
        engine.add(prompt, SamplingParams(max_tokens=steps + 1, ignore_eos=True), key=key)
    engine.step()
    assert engine.stats.generated_tokens == len(prompts), "every prompt is prefilled in the first step"
    found = []
    for step in range(1, steps + 1):
        seconds = counting.seconds_of(engine.step, model.device)
        found.append((seconds, [len(p) + step for p in prompts]))
    assert not engine.busy
    return found


def decode_figures(
    steps: Sequence[tuple[float, list[int]]], model: CausalModel, rate: float, bandwidth: float
) -> dict[str, Any]:
    """Milliseconds per token of a row, and the share of the roofline; medians over the steps."""
    shares, memory_shares, floors = [], [], []
    for seconds, contexts in steps:
        multiply_adds, moved = counting.decode_counts(model, contexts)
        floors.append(counting.roofline_seconds(multiply_adds, moved, rate, bandwidth))
        shares.append(floors[-1] / seconds)
        memory_shares.append(moved / bandwidth / seconds)
    rows = len(steps[0][1])
    milliseconds = [1000 * seconds for seconds, _ in steps]
    multiply_adds, moved = counting.decode_counts(model, steps[len(steps) // 2][1])
    return {
        "ms_per_step": spread(milliseconds),
        "tokens_per_second": rows * 1000 / statistics.median(milliseconds),
        "keys_per_row": statistics.fmean(statistics.fmean(contexts) for _, contexts in steps),
        "multiply_adds": multiply_adds,
        "bytes": moved,
        "matrix_ms": 2000 * multiply_adds / rate,
        "memory_ms": 1000 * moved / bandwidth,
        "share_of_roofline": spread(shares),
        "share_of_bandwidth": spread(memory_shares),
    }


def grpo_task(vocabulary: int, *, quick: bool = False) -> Task:
    """8 prompts of 16 to 32 tokens with 8 completions each of 48 to 96 tokens, every length spread evenly."""
    prompts, samples = (2, 2) if quick else (8, 8)
    lengths = spread_lengths(48, 96, prompts * samples)
    return Task.random(vocabulary, spread_lengths(16, 32, prompts), [lengths[p::prompts] for p in range(prompts)])


def measure(*, quick: bool) -> dict[str, Any]:
    """Everything; progress goes to standard error."""
    rates = Rates("cpu", quick=quick)
    _say("rates of the machine")
    rates.measure()
    learner = Learner.of(network(quick=quick))
    model = learner.model
    task = grpo_task(model.spec.vocab_size, quick=quick)
    _say("training")
    training = train(learner, task, 2 if quick else 7)
    rates.measure()
    steps = {}
    for batch in (1, 2) if quick else BATCHES:
        _say(f"decoding {batch} rows")
        prompts = Task.random(model.spec.vocab_size, spread_lengths(16, 32, batch), [[1]] * batch).prompts
        decode(model, prompts, 2)
        steps[batch] = decode(model, prompts, 4 if quick else 72)
    rates.measure()
    rate = rates.matrix(model.dtype)
    training = share_training(training, rate)
    decoding = {str(n): decode_figures(found, model, rate, rates.bandwidth) for n, found in steps.items()}
    largest = decoding[str(max(steps))]
    summary = {
        "train_share_of_matmul": round(training["share_of_matmul"]["median"], 4),
        "decode_share_of_roofline": round(largest["share_of_roofline"]["median"], 4),
    }
    return {
        "machine": machine(),
        "model": "random, tiny" if quick else "smollm2-135m",
        "dtype": str(model.dtype).removeprefix("torch."),
        "rates": rates.summary(),
        "training": training,
        "decoding": decoding,
        "targets": {name: {"at_least": bound, "met": summary[name] >= bound} for name, bound in TARGETS.items()},
        "summary": summary,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    rates, training = found["rates"], found["training"]
    turn = rates["turns"][0]
    text = [
        f"matrix products: bfloat16 {rates['bfloat16'] / 1e9:.0f}, float32 {rates['float32'] / 1e9:.0f} GFLOP/s, "
        f"{rates['threads']} threads, best of {', '.join(turn['bfloat16']['by_shape'])}",
        f"memory: {rates['memory'] / 1e9:.1f} GB/s, best of summing (read) and copying (read + write) "
        f"{turn['memory']['bytes'] / 1e9:.2g} GB",
        f"training, {found['dtype']}: {training['seconds']['median']:.2f} s per update of {training['packed_tokens']} "
        f"packed tokens ({training['packed_tokens_per_second']:.0f} tokens/s), {training['trained_tokens']} trained",
    ]
    text += [f"  {n / 1e9:10.1f} G multiply-adds  {part}" for part, n in training["multiply_adds"].items()]
    text += [
        f"  {training['multiply_adds_executed'] / 1e9:10.1f} G executed "
        f"(torch saw {training['products_seen_by_torch'] / 1e9:.1f} G in products of linear layers and head)",
        f"  share of the matrix rate {training['share_of_matmul']['median']:.3f}, "
        f"without what is computed again {training['share_without_recomputation']:.3f}",
    ]
    for batch, d in found["decoding"].items():
        text.append(
            f"decoding {batch} rows: {d['ms_per_step']['median']:.1f} ms per token ({d['tokens_per_second']:.0f} "
            f"tokens/s); floor: matrices {d['matrix_ms']:.1f}, memory {d['memory_ms']:.1f} ms; "
            f"share {d['share_of_roofline']['median']:.3f}"
        )
    return text + [target_line(name, found["summary"][name], t) for name, t in found["targets"].items()]


def target_line(name: str, value: float, target: dict[str, Any]) -> str:
    """A figure beside its target."""
    relation, bound = ("at least", target["at_least"]) if "at_least" in target else ("at most", target["at_most"])
    return f"{name} {value:.3f}, wanted {relation} {bound:g}: {'met' if target['met'] else 'NOT MET'}"


def finish(name: str, found: dict[str, Any], text: Sequence[str], *, as_json: bool, keep: bool) -> None:
    """Print the figures for people (with as_json to standard error, and the record), the summary last; save it."""
    if keep:
        _say(f"saved {save(name, found)}")
    print("\n".join(text), file=sys.stderr if as_json else sys.stdout, flush=True)
    if as_json:
        print(json.dumps(found))
    print(json.dumps(found["summary"]), flush=True)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the whole record as one JSON line")
    parser.add_argument("--quick", action="store_true", help="a tiny random network; nothing is saved")
    parser.add_argument("--profile", action="store_true", help="only: which operations one update spends its time in")
    arguments = parser.parse_args()
    if arguments.profile:
        learner = Learner.of(network(quick=arguments.quick))
        print(profile(learner, grpo_task(learner.model.spec.vocab_size, quick=arguments.quick)))
        return 0
    found = measure(quick=arguments.quick)
    finish("roofline", found, lines(found), as_json=arguments.json, keep=not arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
