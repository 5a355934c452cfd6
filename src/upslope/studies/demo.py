"""`upslope demo`: a pretrained model gets better at a verifiable task, first by supervision, then by PPO.

Base, sft and ppo are measured greedily on the same held-out problems, none of which is ever trained on.
"""

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from upslope.atomic import write_atomic
from upslope.build import load_policy
from upslope.evaluation.verdicts import evaluate
from upslope.loop.prompts import held_out_groups
from upslope.loop.session import peak_memory_gb
from upslope.options import DemoOptions, PPOOptions, SFTOptions
from upslope.recipes.ppo import ppo
from upslope.recipes.sft import sft
from upslope.runs.folder import Run
from upslope.studies import new_folder
from upslope.tasks.base import load_task
from upslope.types import RolloutGroup

SAMPLES_SHOWN = 6


def run(options: DemoOptions) -> int:
    """The verb `upslope demo`."""
    summary = demo(options)
    if options.json:
        print(json.dumps(summary))
    return 130 if summary["stopped"] == "interrupted" else 0


def sft_options(o: DemoOptions, folder: Path) -> SFTOptions:
    """A little supervision: enough to teach the form of the answer, not enough to exhaust the task."""
    return SFTOptions(
        **_shared(o, folder / "sft", o.sft_steps, warmup=5),
        model=o.model,
        num_examples=16 * o.sft_steps,
        batch_size=16,
        learning_rate=3e-5,
        lr_scheduler_type="constant",
    )


def ppo_options(o: DemoOptions, folder: Path, model: str) -> PPOOptions:
    """PPO from the supervised weights, with a critic on the policy's trunk."""
    return PPOOptions(
        **_shared(o, folder / "ppo", o.ppo_steps, warmup=2),
        model=model,
        num_train_prompts=2000,
        num_prompts=32,
        num_generations=4,
        learning_rate=2e-5,
        lr_scheduler_type="linear",
        num_epochs=1,
        num_minibatches=2,
        gamma=1.0,
        lam=0.95,
        vf_coef=0.1,
        micro_batch_tokens=640,
    )


def _shared(o: DemoOptions, folder: Path, steps: int, *, warmup: int) -> dict[str, Any]:
    """What both stages have: measured at the end only, and the last checkpoint alone is kept."""
    length = {"max_steps": steps, "warmup_steps": min(warmup, steps), "save_every": max(steps, 1), "keep_last": 1}
    measured = {"eval_every": 0, "eval_samples": o.eval_samples, "max_completion_length": 8}
    return {"task": o.task, "output_dir": str(folder), "seed": o.seed, **length, **measured}


def demo(o: DemoOptions) -> dict[str, Any]:
    """Run the three stages; returns what summary.json holds."""
    started = time.perf_counter()
    place = Path(o.output_dir) if o.output_dir else Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    folder = new_folder(place, "choose another folder with --output-dir")
    _say(f"demo: {o.model} on {o.task}, measured on {o.eval_samples} held-out problems; folder {folder}")
    task = load_task(o.task)
    supervised = sft_options(o, folder)
    policy = load_policy(supervised)
    samples, accuracy, seconds = {}, {}, {}
    groups = held_out_groups(policy, task, o.eval_samples, supervised.max_completion_length)
    accuracy["base"], samples["base"] = evaluate(groups), _shown(groups)
    seconds["base"] = time.perf_counter() - started
    base = accuracy["base"]
    _say(f"demo: base: {base['value']:.1%} [{base['low']:.1%}, {base['high']:.1%}] of {base['n']}")

    trained = sft(supervised, policy=policy)
    del policy, groups
    gc.collect()
    stages = {"sft": trained}
    if trained["stopped"] != "interrupted":
        stages["ppo"] = ppo(ppo_options(o, folder, str(folder / "sft" / "checkpoints" / "last" / "model")))
    for stage, outcome in stages.items():
        seconds[stage] = outcome["seconds"]
        if outcome["evaluation"]:
            accuracy[stage] = outcome["evaluation"]["accuracy"]
            with Run.open(folder / stage, read_only=True) as stored:
                rows = stored.store.rollouts(split="eval", limit=SAMPLES_SHOWN)
            samples[stage] = [
                {"prompt": r.prompt, "answer": r.answer, "completion": r.completion, "correct": r.correct} for r in rows
            ]
    summary = {
        "accuracy": accuracy,
        "seconds": round(time.perf_counter() - started, 3),
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "seconds_by_stage": seconds,
        "task": o.task,
        "model": o.model,
        "seed": o.seed,
        "stopped": list(stages.values())[-1]["stopped"],
        "samples": samples,
        "ppo": _ppo_numbers(folder / "ppo") if "ppo" in stages else None,
        "folder": str(folder),
    }
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    _show(summary)
    return summary


def _shown(groups: list[RolloutGroup]) -> list[dict[str, Any]]:
    return [
        {"prompt": g.prompt.messages[-1].content if g.prompt.messages else g.prompt.text, "answer": g.prompt.answer}
        | {"completion": g.rollouts[0].text, "correct": g.rollouts[0].reward.correct}
        for g in groups[:SAMPLES_SHOWN]
    ]


def _ppo_numbers(folder: Path) -> dict[str, Any]:
    """How the critic came along, and where a step's seconds went: means over the first and the last fifth."""
    with Run.open(folder, read_only=True) as stored:
        lines = stored.metric_lines()
    fifth = max(1, len(lines) // 5)

    def mean(name: str, part: list[dict[str, Any]]) -> float:
        values = [line[name] for line in part if isinstance(line.get(name), int | float)]
        return sum(values) / len(values) if values else float("nan")

    def ends(name: str) -> dict[str, float]:
        return {"first": mean(name, lines[:fifth]), "last": mean(name, lines[-fifth:])}

    return {
        "explained_variance": ends("val/explained_variance"),
        "reward": ends("reward"),
        "max_logprob_diff": max(line["rollout/max_logprob_diff"] for line in lines),
        "seconds_per_step": {name: mean(f"seconds/{name}", lines) for name in ("rollout", "reward", "update")},
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show(summary: dict[str, Any]) -> None:
    """The closing tables, on standard error."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, highlight=False)
    table = Table(title="greedy accuracy on held-out problems", title_justify="left")
    for column in ("stage", "accuracy", "95% interval", "n", "seconds"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, a in summary["accuracy"].items():
        interval = f"{a['low']:.1%} - {a['high']:.1%}"
        table.add_row(stage, f"{a['value']:.1%}", interval, str(a["n"]), f"{summary['seconds_by_stage'][stage]:.0f}")
    console.print(table)
    for stage, shown in summary["samples"].items():
        for sample in shown[:3]:
            mark = "right" if sample["correct"] else "wrong"
            question = " ".join(str(sample["prompt"]).split())
            completion = " ".join(str(sample["completion"]).split())
            console.print(f"{stage:>4}  {question[-48:]}  ->  {completion[:40]!r}  {mark}", markup=False)
    console.print(
        f"{summary['seconds']:.0f} s, {summary['peak_memory_gb']:.1f} GB at the peak, folder {summary['folder']}"
    )
