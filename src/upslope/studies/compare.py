"""`upslope compare`: recipes from the same weights, on the same budget, with several seeds, in one report.

Every run is measured at its end in the same way and on the same held-out problems: greedy quality with intervals that
pair the problems, the KL divergence from the start, the diversity of what is sampled and how well the policy's
confidence in its own replies is calibrated. What a recipe makes of its budget on the way is in the learning curves.
"""

import gc
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, count, product
from pathlib import Path
from typing import Any

import torch

from upslope.atomic import write_atomic
from upslope.build import Policy, load_inference, load_policy, make_engine
from upslope.config import load
from upslope.data.chat import encode_prompt
from upslope.errors import ConfigError, RunError
from upslope.evaluation.behaviour import calibration, distinct_n, self_bleu
from upslope.evaluation.measurement import bootstrap_mean, paired_bootstrap
from upslope.loop.kept import tell_task
from upslope.options import CompareOptions, RunOptions
from upslope.preview.plan import plan_of
from upslope.recipes import CLASSES, recipe_of
from upslope.rollout import collect
from upslope.runs.folder import Run
from upslope.studies import new_folder
from upslope.studies.report import write_report
from upslope.tasks.base import Task, load_task, prompts_of
from upslope.training.experience import Experience
from upslope.training.step import score
from upslope.types import Prompt, SamplingParams
from upslope.workers.rewards import make_scorer


@dataclass(frozen=True, slots=True)
class Entry:
    """One recipe of the comparison: what it is called, its verb and its options."""

    label: str
    verb: str
    options: RunOptions


def run(options: CompareOptions) -> int:
    """The verb `upslope compare`."""
    result = compare(options)
    print(json.dumps(result) if options.json else table(result))
    return 130 if result["stopped"] == "interrupted" else 0


def compare(o: CompareOptions) -> dict[str, Any]:
    """Run and measure everything; returns what compare.json holds. report.html stands beside it."""
    entries = read_entries(o)
    folder = _folder(o)
    task = load_task(_shared(entries, "task"))
    prompts = prompts_of(task, "eval", o.eval_samples, seed=0)
    tell_task(task, len(prompts))
    longest = max(int(getattr(e.options, "max_completion_length", 64)) for e in entries)
    result: dict[str, Any] = {
        "task": _shared(entries, "task"),
        "model": _shared(entries, "model"),
        "budget": {"seconds": o.max_seconds, "trained_tokens": o.max_tokens},
        "seeds": list(range(o.seed, o.seed + o.seeds)),
        "n": len(prompts),
        "stopped": "done",
        "runs": {},
    }
    start = _kept(folder / "start.json")
    if start is None:
        start = measure(load_policy(entries[0].options), None, task, prompts, longest, shown=o.samples_shown)
        _keep(folder / "start.json", start)
    result["start"] = start
    for seed, entry in product(result["seeds"], entries):
        measured = _run_one(entry, seed, folder, task, prompts, longest, o)
        if measured is None:
            result["stopped"] = "interrupted"
            break
        result["runs"].setdefault(entry.label, {})[str(seed)] = measured
        gc.collect()
    result |= {"recipes": summarise(result), "pairs": pairs(result), "folder": str(folder)}
    write_atomic(folder / "compare.json", json.dumps(result, indent=1) + "\n")
    if result["runs"]:
        write_report(folder / "report.html", result)
    return result


def read_entries(o: CompareOptions) -> list[Entry]:
    """The recipes with the shared budget, model and task in them. ConfigError where they cannot be compared."""
    entries = []
    for path in map(Path, o.configs):
        verb = path.stem.partition("_")[0]
        if verb not in CLASSES:
            raise ConfigError(
                f"{path}: its name must begin with the recipe, as in ppo_mine.toml (one of {', '.join(CLASSES)})"
            )
        overrides = {"max_seconds": o.max_seconds, "max_tokens": o.max_tokens}
        overrides |= {name: getattr(o, name) for name in ("model", "task") if getattr(o, name) is not None}
        loaded = load(CLASSES[verb], path, overrides={k: v for k, v in overrides.items() if v is not None})
        if getattr(loaded, "task", None) is None:
            raise ConfigError(f"{path}: no task in it; all recipes of a comparison are measured on one task")
        entries.append(Entry(path.stem, verb, loaded))
    labels = [entry.label for entry in entries]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"two configurations are called {twice}.toml; rename one, the report goes by their names")
    for name in ("model", "task"):
        _shared(entries, name)
    return entries


def _shared(entries: Sequence[Entry], name: str) -> Any:
    values = {getattr(entry.options, name) for entry in entries}
    if len(values) > 1:
        raise ConfigError(f"the configurations differ in {name} ({', '.join(sorted(map(str, values)))}): give --{name}")
    return values.pop()


def _folder(o: CompareOptions) -> Path:
    if o.resume:
        folder = Path(o.output_dir or "")
        if not folder.is_dir():
            raise RunError(f"{folder}: no comparison to resume there")
        return folder
    free = (folder for n in count(1) if not (folder := Path("runs") / f"compare-{n}").exists())
    folder = Path(o.output_dir) if o.output_dir is not None else next(free)
    return new_folder(folder, "choose another --output-dir, or --resume it")


def _run_one(
    entry: Entry, seed: int, folder: Path, task: Task, prompts: Sequence[Prompt], longest: int, o: CompareOptions
) -> dict[str, Any] | None:
    """Train and measure one recipe with one seed; None when Ctrl-C ended it. What is finished is not done again."""
    place = folder / entry.label / f"seed-{seed}"
    kept = _kept(place / "measured.json")
    if kept is not None:
        return kept
    print(f"compare: {entry.label}, seed {seed}", file=sys.stderr)
    begun = (place / "config.toml").is_file()
    options = replace(entry.options, seed=seed, output_dir=str(place), resume=begun, json=False, dry_run=False)
    policy = load_policy(options)
    summary = recipe_of(options)(options, policy=policy)
    if summary["stopped"] == "interrupted":
        return None
    measured = measure(policy, options, task, prompts, longest, shown=o.samples_shown)
    measured |= {name: summary[name] for name in ("steps", "trained_tokens", "seconds", "stopped")}
    measured["curve"] = curve(place, plan_of(options).sequences_per_step)
    _keep(place / "measured.json", measured)
    return measured


def curve(folder: Path, samples_per_step: int) -> list[dict[str, float]]:
    """Held-out quality along a run: step, training samples, training seconds, value."""
    with Run.open(folder, read_only=True) as opened:
        held_out, spent = opened.store.evaluations("held-out"), opened.store.evaluations("spent")
    seconds = {e.step: e.value for e in spent if e.metric == "seconds"}
    metric = "accuracy" if "accuracy" in {e.metric for e in held_out} else "reward"
    return [
        {"step": e.step, "samples": e.step * samples_per_step, "seconds": seconds[e.step], "value": e.value}
        for e in held_out
        if e.metric == metric
    ]


@torch.no_grad()
def measure(
    policy: Policy, options: RunOptions | None, task: Task, prompts: Sequence[Prompt], longest: int, *, shown: int
) -> dict[str, Any]:
    """Greedy quality, and of one sample per problem at temperature 1: KL from the start, diversity, calibration.

    `options` name the start model; None says that `policy` is the start itself.
    """
    policy.model.eval()
    encoded = max(len(encode_prompt(policy.tokenizer, prompt)) for prompt in prompts)
    engine = make_engine(policy, sequences=len(prompts), longest=encoded + longest)
    with make_scorer(task) as judge:
        greedy, sampled = (
            collect(engine, policy.tokenizer, judge, prompts, SamplingParams(max_tokens=longest, **how))[0]
            for how in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 12345})
        )
    texts = [g.rollouts[0].text for g in sampled]
    rewards = [g.rollouts[0].reward for g in greedy]
    verdicts = any(r.correct is not None for r in rewards)
    found: dict[str, Any] = {
        # one number per problem: its verdict, or its reward where the task gives none; a failed judgement counts 0
        "quality": [float(bool(r.correct)) if verdicts else float(r.value or 0.0) for r in rewards],
        "metric": "accuracy" if verdicts else "reward",
        "kl": 0.0,
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "self_bleu": self_bleu(texts),
        "calibration": None,
        "replies": [
            {
                "prompt": g.prompt.messages[-1].content if g.prompt.text is None else g.prompt.text,
                "reply": g.rollouts[0].text,
                "reward": g.rollouts[0].reward.value,
            }
            for g in greedy[:shown]
        ],
    }
    if options is not None:  # mean over replies of sum_t log pi / log start, on the policy's own samples
        experience = Experience.of(sampled)
        batches, order = experience.batches(
            range(experience.size), options.micro_batch_tokens, device=policy.model.device
        )
        start = load_inference(options.model, dtype=options.dtype).model
        own, reference = (experience.in_order(score(m, batches), order).logp_N for m in (policy.model, start))
        found["kl"] = float(experience.sequence_sums(own - reference).mean())
    if verdicts:
        sure = [min(1.0, math.exp(math.fsum(g.rollouts[0].policy_logprobs))) for g in sampled]
        found["calibration"] = calibration(sure, [bool(g.rollouts[0].reward.correct) for g in sampled])
    return found


def summarise(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per recipe: medians over seeds and, over problems, the paired interval of the gain on the start."""
    rows = []
    for label, runs in {"start": {"": result["start"]}, **result["runs"]}.items():
        quality = _per_problem(runs)
        row: dict[str, Any] = {
            "label": label,
            "quality": {**bootstrap_mean(quality)._asdict(), "n": len(quality)},
            "by_seed": [statistics.fmean(r["quality"]) for r in runs.values()],
            "gain": paired_bootstrap(quality, result["start"]["quality"])._asdict(),
        }
        measured = [{**r, **({"ece": r["calibration"]["ece"]} if r["calibration"] else {})} for r in runs.values()]
        for name in ("kl", "distinct_1", "distinct_2", "self_bleu", "seconds", "trained_tokens", "steps", "ece"):
            found = [r[name] for r in measured if name in r]
            row[name] = statistics.median(found) if found else None
        rows.append(row)
    return rows


def pairs(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every recipe against every later one: the mean difference over problems with its paired bootstrap interval."""
    quality = {label: _per_problem(runs) for label, runs in result["runs"].items()}
    differences = {(a, b): paired_bootstrap(quality[b], quality[a]) for a, b in combinations(quality, 2)}
    return [{"a": a, "b": b, **found._asdict()} for (a, b), found in differences.items()]


def _per_problem(runs: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """The mean over seeds of each problem's quality."""
    return [statistics.fmean(column) for column in zip(*(r["quality"] for r in runs.values()), strict=True)]


def table(result: Mapping[str, Any]) -> str:
    """The comparison as plain lines."""
    head = f"{'recipe':<24} {'quality':>8} {'95% interval':>18} {'gain':>8} {'KL':>7} {'dist-2':>7} {'ECE':>6} {'s':>6}"
    lines = [head]
    for row in result["recipes"]:
        q = row["quality"]
        interval = f"[{q['low']:.3f}, {q['high']:.3f}]"
        ece = "" if row["ece"] is None else f"{row['ece']:.3f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lines.append(
            f"{row['label']:<24} {q['value']:>8.3f} {interval:>18} {row['gain']['value']:>+8.3f} {row['kl']:>7.3f} "
            f"{row['distinct_2']:>7.3f} {ece:>6} {seconds:>6}"
        )
    for pair in result["pairs"]:
        sure = "" if pair["low"] <= 0 <= pair["high"] else "  (the interval excludes 0)"
        lines.append(f"{pair['b']} - {pair['a']}: {pair['value']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}]{sure}")
    return "\n".join([*lines, f"report: {result['folder']}/report.html"])


def _kept(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _keep(path: Path, value: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(value) + "\n")
