"""What a run says when it ends: how far it came, what was measured before and after, and the commands to go on with."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from upslope.data.readers import rows_of
from upslope.data.records import record_of
from upslope.errors import UpslopeError
from upslope.options import EvalOptions, RunOptions
from upslope.plugins import Spec, format_spec
from upslope.runs.folder import Run
from upslope.runs.lines import in_words
from upslope.training import checkpoint
from upslope.training.stopping import StopWhen

__all__ = ["closing_words", "commands_of", "measured", "opening_words", "told_when_stopped"]


def opening_words(options: RunOptions, learner: Any) -> str:
    """One line on what is trained: rows, model, parameters, learning rate, dtype."""
    model = learner.policy.model if hasattr(learner, "policy") else getattr(learner, "encoder", None)
    train = learner.account.splits.get("train")
    words = [f"trains on {train.rows:,}, {learner.account.held_out}"] if train else []
    if model is not None:
        counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
        whole, trained = sum(n for n, _ in counts), sum(n for n, moves in counts if moves)
        part = f"{trained:,} of its {whole:,}" if trained < whole else f"its {whole:,}"
        words.append(f"{options.model}: {part} parameters, in {str(model.dtype).removeprefix('torch.')}")
    return "; ".join([*words, f"learning rate {options.learning_rate:g}, {options.max_steps:,} steps"])


def measured(run: Run, stop: StopWhen) -> dict[str, Any]:
    """What the best checkpoint was chosen by, its evaluation, and that of the start; None where there is none."""
    best = None if stop.best_step is None else {"step": stop.best_step, "evaluation": run.evaluated(stop.best_step)}
    return {"measure": run.measure, "start": run.evaluated(0) if stop.steps else None, "best": best}


def commands_of(verb: str, options: Any, folder: Path, stop: StopWhen, tokenizer: Any) -> dict[str, str]:
    """Command lines by what they are for; `tokenizer` is that of a model that writes texts, else None."""
    run, found = str(folder), {}
    if tokenizer is not None and verb != "reward":
        chats = getattr(tokenizer, "chat_template", None)
        found["chat"] = ["chat", run] if chats else ["generate", run, "--prompt", "your text"]
    if measure := _measuring(verb, options):
        found["evaluate"] = ["eval", run, *measure]
    if "chat" in found:
        found["serve"] = ["serve", run]
    if verb == "reward":
        found["use"] = ["grpo", "--model", options.model, "--reward", format_spec(Spec("reward_model", {"path": run}))]
    found["continue"] = [verb, "--resume", "--output-dir", run, *_further(options, stop)]
    return {name: shlex.join(["upslope", *words]) for name, words in found.items()}


def closing_words(summary: Mapping[str, Any]) -> list[str]:
    """A few lines for the terminal."""
    folder, best, measure = summary["folder"], summary["best"], summary["measure"]
    if (ended := summary["stopped"]) == "interrupted":
        ended = f"interrupted after step {summary['steps']}, which is saved"
    chosen = f"; best checkpoint: step {best['step']}, by {measure}" if best else ""
    lines = [f"{summary['verb']}: {ended}; in {folder}{chosen}"]
    times = {"at the start": summary["start"], "at the end": summary["evaluation"]}
    if best and best["step"] != summary["steps"]:
        times = {"at the start": summary["start"], f"at step {best['step']} (best)": best["evaluation"], **times}
    for name in dict.fromkeys([measure, "reward"]):
        there = {when: found[name] for when, found in times.items() if name in (found or {})}
        if there:
            said = " -> ".join(f"{in_words({'': value}).strip()} {when}" for when, value in there.items())
            lines.append(f"held-out {name.removeprefix('eval_')}: {said}")
    width = max(map(len, summary["commands"]))
    return [*lines, *(f"  {name:<{width}}  {command}" for name, command in summary["commands"].items())]


@contextmanager
def told_when_stopped(verb: str, run: Run) -> Iterator[None]:
    """At a second Ctrl-C, which stops at once, say what is left and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        steps = [each.step for each in checkpoint.list_checkpoints(run.checkpoints)]
        kept = f"the last checkpoint is of step {max(steps)}" if steps else "no checkpoint was saved yet"
        again = shlex.join(["upslope", verb, "--resume", "--output-dir", str(run.folder)])
        print(f"{verb}: stopped at once; {kept}; go on from there: {again}", file=sys.stderr)
        raise


def _measuring(verb: str, options: Any) -> list[str]:
    """The options of `upslope eval` for the run's held-out file (or else FILE) or task; [] where it cannot tell."""
    task, longest = getattr(options, "task", None), getattr(options, "max_completion_length", None)
    length = [] if longest in (None, EvalOptions.max_completion_length) else ["--max-completion-length", str(longest)]
    if task is not None:
        return [] if getattr(options, "reward", ()) else ["--task", task, *length]
    held_out = getattr(options, "test_data", None) or getattr(options, "eval_data", None)
    files = [held_out] if isinstance(held_out, str) else list(held_out or ())
    if not all(Path(file).is_file() for file in files):
        return []
    files = files or ["FILE"]
    if verb == "pretrain":
        return [] if options.architecture == "encoder" else ["--perplexity", *files]
    if verb == "reward":
        return ["--preferences", *files] if options.kind == "outcome" else []
    if verb in ("classify", "tag"):
        columns = ("text_column", "label_column", "pair_column", "token_column", "tag_column", "tag_scheme")
        default = type(options)()
        own = any(getattr(options, name, None) != getattr(default, name, None) for name in columns)
        return [] if own else ["--data", *files]
    alike = files[0] if held_out else getattr(options, "data", None) or ""
    if not Path(alike).is_file():
        return []
    with suppress(UpslopeError):
        where, row = next(rows_of(alike, columns=options.columns))
        columns = ["--columns", *options.columns] if options.columns else []
        if record_of(row, where).text is not None:
            return [] if columns else ["--perplexity", *files]
        if verb == "sft" and longest == type(options).max_completion_length:
            length = []  # it is about a task: replies to rows may be longer
        if verb in ("sft", "seq2seq"):
            return ["--data", *files, "--metrics", "bleu" if verb == "seq2seq" else "rougeL", *columns, *length]
    return []


def _further(options: RunOptions, stop: StopWhen) -> list[str]:
    """The limit that ended the run, twice as far."""
    for name, spent in (("max_steps", stop.steps), ("max_tokens", stop.tokens), ("max_seconds", stop.seconds)):
        limit = getattr(options, name)
        if limit is not None and spent >= limit:
            return [f"--{name.replace('_', '-')}", str(round(2 * max(limit, spent)) or 1)]
    if options.patience is not None and stop.patience.exhausted:
        return ["--patience", str(2 * options.patience)]
    return []
