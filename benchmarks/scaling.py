"""How the cost of a policy-gradient step grows: with the group, with unequal lengths, with context and vocabulary.

    python benchmarks/scaling.py --json                  SmolLM2-135M: some six minutes on two cores
    python benchmarks/scaling.py --json --only group     one part: group, lengths, context, vocabulary; nothing is saved
    python benchmarks/scaling.py --quick                 tiny random networks, to see that it runs; nothing is saved

A step is the rollout and the update on it (rollout log-probs as the old ones; benchmarks/workload.py).

group: 4 prompts of 512 tokens, 1 to 16 completions each of 64 tokens. lengths: 8 prompts x 8 completions with 3,072
tokens in all, whose lengths are all equal, uniform (1 to twice the mean), or heavy-tailed (Pareto, exponent 1.5: the
longest has nine times the mean). context: forward and backward of 4,096 packed tokens, the last quarter of each
sequence trained, and decoding 4 rows. vocabulary: head and loss per trained token, sampling per row, on a one-layer
random decoder of the same width. Results: benchmarks/results/<machine>/scaling.json.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.counting import seconds_of
from benchmarks.machine import machine, spread
from benchmarks.roofline import decode, finish, target_line
from benchmarks.workload import MICRO_BATCH_TOKENS, Learner, Task, experience, network, random_decoder
from upslope.data.batching import collate
from upslope.engine.sampling import Row, sample, uniforms
from upslope.functional.logprobs import linear_token_logprobs
from upslope.models.protocol import CausalModel
from upslope.training.step import Forward
from upslope.types import Example, SamplingParams

PARTS = ("group", "lengths", "context", "vocabulary")
DOUBLING_TARGET, HEAVY_TAIL_TARGET = 1.7, 1.2


def doubling_ratios(costs: dict[int, float]) -> dict[str, float]:
    """cost(next) / cost of every step of a ladder, in the ladder's order."""
    rungs = sorted(costs)
    return {f"{a}->{b}": costs[b] / costs[a] for a, b in itertools.pairwise(rungs)}


def heavy_tailed(count: int, total: int, exponent: float = 1.5) -> list[int]:
    """`count` lengths of at least 1 that add up to `total`, at the even quantiles of a Pareto distribution."""
    raw = [(1 - (i + 0.5) / count) ** (-1 / exponent) for i in range(count)]
    return _adding_up(raw, total)


def uniform(count: int, total: int) -> list[int]:
    """`count` lengths spread evenly from about 1 to twice the mean, adding up to `total`."""
    return _adding_up([i + 0.5 for i in range(count)], total)


def _adding_up(raw: Sequence[float], total: int) -> list[int]:
    if total < len(raw):
        raise ValueError(f"{len(raw)} completions cannot have {total} tokens in all: each has at least one")
    spare, whole = total - len(raw), sum(raw)
    ends = [round(spare * sum(raw[: i + 1]) / whole) for i in range(len(raw))]
    return [1 + b - a for a, b in itertools.pairwise([0, *ends])]


def steps(learner: Learner, tasks: dict[Any, Task], rounds: int) -> dict[Any, dict[str, Any]]:
    """Seconds of rollout, update and both for every task, all tasks in turn in every round, after a warm-up."""
    engines = {name: task.engine(learner.model) for name, task in tasks.items()}
    found: dict[Any, dict[str, list[float]]] = {n: {"rollout": [], "update": [], "step": []} for n in tasks}
    last = list(tasks)[-1]
    learner.update(experience(tasks[last].rollout(engines[last])))
    for _ in range(rounds):
        for name, task in tasks.items():
            groups: list[Any] = []
            rollout = seconds_of(lambda t=task, e=engines[name], g=groups: g.extend(t.rollout(e)), learner.model.device)
            change = seconds_of(lambda g=groups: learner.update(experience(g)), learner.model.device)
            for part, seconds in zip(("rollout", "update", "step"), (rollout, change, rollout + change), strict=True):
                found[name][part].append(seconds)
    return {
        name: {
            **{part: spread(seconds) for part, seconds in parts.items()},
            "tokens": tasks[name].tokens,
            "generated": sum(map(sum, tasks[name].lengths)),
        }
        for name, parts in found.items()
    }


def group_part(learner: Learner, rounds: int, *, quick: bool) -> dict[str, Any]:
    """A whole step at a fixed prompt and growing groups."""
    prompts, prompt, tokens = (2, 64, 4) if quick else (4, 512, 64)
    vocabulary = learner.model.spec.vocab_size
    tasks = {g: Task.random(vocabulary, [prompt] * prompts, [[tokens] * g] * prompts) for g in (1, 2, 4, 8, 16)}
    found = steps(learner, tasks, rounds)
    ratios = {
        part: doubling_ratios({g: f[part]["median"] for g, f in found.items()})
        for part in ("step", "rollout", "update")
    }
    return {
        "prompts": prompts,
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "by_size": found,
        "ratios": ratios,
    }


def lengths_part(learner: Learner, rounds: int, *, quick: bool) -> dict[str, Any]:
    """A whole step with the same number of tokens in completions of different lengths."""
    prompts, samples, mean = (2, 4, 6) if quick else (8, 8, 48)
    count = prompts * samples
    kinds = {
        "equal": [mean] * count,
        "uniform": uniform(count, mean * count),
        "heavy": heavy_tailed(count, mean * count),
    }
    tasks = {}
    for name, lengths in kinds.items():
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        mixed = [lengths[i] for i in order]
        split = [mixed[p * samples : (p + 1) * samples] for p in range(prompts)]
        tasks[name] = Task.random(learner.model.spec.vocab_size, [24] * prompts, split, one_by_one=True)
    found = steps(learner, tasks, rounds)
    median = {name: f["step"]["median"] for name, f in found.items()}
    return {
        "completions": count,
        "mean_tokens": mean,
        "longest": {name: max(lengths) for name, lengths in kinds.items()},
        "by_kind": found,
        "heavy_tail": median["heavy"] / median["uniform"],
        "heavy_tail_against_equal": median["heavy"] / median["equal"],
    }


def context_part(learner: Learner, rounds: int, *, quick: bool) -> dict[str, Any]:
    """One packed batch of a fixed number of tokens, and decoding, at growing contexts."""
    model = learner.model
    total, rows, decoded = (512, 2, 3) if quick else (4096, 4, 16)
    contexts = (64, 128, 256) if quick else (256, 512, 1024, 2048, 4096)
    found = {}
    for context in contexts:
        batch = packed(model, [context] * (total // context))

        def both(batch: Any = batch) -> None:
            out = Forward()(model, batch)
            out.logp_N.mean().backward()
            learner.optimizer.zero_grad()

        model.train()
        if context == contexts[0]:
            both()
        passes = [seconds_of(both, model.device) for _ in range(rounds)]
        prompts = Task.random(model.spec.vocab_size, [context] * rows, [[1]] * rows).prompts
        model.eval()
        times = [1000 * seconds for seconds, _ in decode(model, prompts, decoded)]
        found[context] = {
            "forward_backward_tokens_per_second": total / statistics.median(passes),
            "forward_backward_seconds": spread(passes),
            "decode_ms": spread(times),
        }
    return {"packed_tokens": total, "decode_rows": rows, "by_context": found}


def packed(model: CausalModel, lengths: Sequence[int]) -> Any:
    """Random sequences, the last quarter of each trained."""
    prompts = Task.random(model.spec.vocab_size, lengths, [[1]] * len(lengths)).prompts
    examples = [Example(p, [i >= len(p) - len(p) // 4 for i in range(len(p))]) for p in prompts]
    return collate(examples, device=model.device)


def vocabulary_part(dtype: torch.dtype, rounds: int, *, quick: bool) -> dict[str, Any]:
    """Head, loss and sampling on their own."""
    rows, drawn = (64, 8) if quick else (1024, 64)
    found = {}
    for size in (512, 1024) if quick else (8192, 32768, 131072):
        model = random_decoder(quick=quick, vocab_size=size, num_hidden_layers=1).to(dtype)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(rows, model.spec.hidden_size, generator=generator).to(dtype).requires_grad_()
        targets = torch.randint(size, (rows,), generator=generator)

        def head(model: CausalModel = model, hidden: Any = hidden, targets: Any = targets) -> None:
            linear_token_logprobs(hidden, model.head_weight, targets).mean().backward()
            hidden.grad = None
            model.head_weight.grad = None

        with torch.inference_mode():
            logits = model.logits(hidden[:drawn])
        numbers = uniforms([0] * drawn, range(drawn), [0] * drawn, [0] * drawn).tolist()
        plan = [Row(SamplingParams(), number) for number in numbers]
        prompts = Task.random(size, [16] * drawn, [[1]] * drawn).prompts
        head_ms = _milliseconds(head, 1 + 2 * rounds)
        with torch.inference_mode():
            sampling = _milliseconds(lambda logits=logits, plan=plan: sample(logits, plan), 2 + 4 * rounds)
        decoding = [1000 * seconds for seconds, _ in decode(model.eval(), prompts, 2 + 2 * rounds)][1:]
        found[size] = {
            "head_and_loss_ms_per_token": {name: ms / rows for name, ms in head_ms.items()},
            "sampling_ms_per_row": {name: ms / drawn for name, ms in sampling.items()},
            "one_layer_decode_ms_per_row": {name: ms / drawn for name, ms in spread(decoding).items()},
        }
    return {"rows_trained": rows, "rows_drawn": drawn, "by_size": found}


def _milliseconds(work: Callable[[], object], times: int) -> dict[str, float]:
    """Of `times` calls, the first left out."""
    return spread([1000 * seconds_of(work) for _ in range(times)][1:])


def measure(parts: Sequence[str], rounds: int, *, quick: bool) -> dict[str, Any]:
    """The parts asked for; progress goes to standard error."""
    learner = Learner.of(network(quick=quick))
    found: dict[str, Any] = {
        "machine": machine(),
        "model": "random, tiny" if quick else "smollm2-135m",
        "dtype": str(learner.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "micro_batch_tokens": MICRO_BATCH_TOKENS,
        "rounds": rounds,
    }
    summary: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    for part in parts:
        print(part, file=sys.stderr, flush=True)
        if part == "group":
            found[part] = group_part(learner, rounds, quick=quick)
            summary["group_doubling"] = _rounded(found[part]["ratios"]["step"])
            worst = max(summary["group_doubling"].values())
            targets["group_doubling"] = {"value": worst, "at_most": DOUBLING_TARGET, "met": worst <= DOUBLING_TARGET}
        elif part == "lengths":
            found[part] = lengths_part(learner, rounds, quick=quick)
            for name in ("heavy_tail", "heavy_tail_against_equal"):
                summary[name] = round(found[part][name], 3)
            value = summary["heavy_tail"]
            targets["heavy_tail"] = {"value": value, "at_most": HEAVY_TAIL_TARGET, "met": value <= HEAVY_TAIL_TARGET}
        elif part == "context":
            found[part] = context_part(learner, rounds, quick=quick)
            by = found[part]["by_context"]
            summary["context_tokens_per_second"] = {
                str(c): round(f["forward_backward_tokens_per_second"], 1) for c, f in by.items()
            }
            summary["context_decode_ms"] = {str(c): round(f["decode_ms"]["median"], 2) for c, f in by.items()}
        else:
            found[part] = vocabulary_part(learner.model.dtype, rounds, quick=quick)
            by = found[part]["by_size"]
            for name in ("head_and_loss_ms_per_token", "sampling_ms_per_row"):
                summary[f"vocabulary_{name}"] = {str(size): round(f[name]["median"], 4) for size, f in by.items()}
    return {**found, "targets": targets, "summary": summary}


def _rounded(ratios: dict[str, float]) -> dict[str, float]:
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = []
    if "group" in found:
        part = found["group"]
        for size, f in part["by_size"].items():
            text.append(_step_line(f"group of {size} at {part['prompt_tokens']} prompt tokens", f))
    if "lengths" in found:
        part = found["lengths"]
        for kind, f in part["by_kind"].items():
            text.append(_step_line(f"{kind} lengths, longest {part['longest'][kind]}", f))
    if "context" in found:
        for context, f in found["context"]["by_context"].items():
            text.append(
                f"context {context}: {f['forward_backward_tokens_per_second']:.0f} tokens/s forward and backward, "
                f"{f['decode_ms']['median']:.1f} ms to decode {found['context']['decode_rows']} rows"
            )
    if "vocabulary" in found:
        for size, f in found["vocabulary"]["by_size"].items():
            text.append(
                f"vocabulary {size}: {f['head_and_loss_ms_per_token']['median']:.3f} ms per trained token, "
                f"{f['sampling_ms_per_row']['median']:.3f} ms per drawn row"
            )
    return text + [target_line(name, t["value"], t) for name, t in found["targets"].items()]


def _step_line(what: str, f: dict[str, Any]) -> str:
    seconds = ", ".join(f"{part} {f[part]['median']:.2f} s" for part in ("rollout", "update", "step"))
    return f"{what}: {seconds} ({f['generated']} tokens generated)"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the whole record as one JSON line")
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part (may be repeated)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of everything; medians count")
    parser.add_argument("--quick", action="store_true", help="tiny random networks; nothing is saved")
    arguments = parser.parse_args()
    found = measure(arguments.only or PARTS, arguments.rounds, quick=arguments.quick)
    keep = not arguments.quick and not arguments.only
    finish("scaling", found, lines(found), as_json=arguments.json, keep=keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
