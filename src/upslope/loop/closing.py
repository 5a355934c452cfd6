"""What a run says when it ends: how far it came, what was measured before and after, and the commands to go on with."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from upslope.config import OBJECT, dump
from upslope.data.readers import rows_of
from upslope.data.records import record_of
from upslope.errors import UpslopeError
from upslope.options import EvalOptions, ExpertOptions, GRPOOptions, RLOptions, RunOptions
from upslope.plugins import Spec, format_spec
from upslope.runs.folder import Run
from upslope.runs.lines import in_words
from upslope.training import checkpoint
from upslope.training.stopping import StopWhen


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
    if f'"{OBJECT}' not in dump(options):  # else only the program that holds the object can
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


MOST = 0.5
"""A share of completions that is worth a sentence."""
_EQUAL = 1e-9  # the deviation of equal rewards, rounding aside

Lines = Sequence[Mapping[str, float]]


def last_words(lines: Lines, options: RunOptions, *, open_ended: bool = False) -> list[str]:
    """Remarks on the metrics of a whole run, one per step; a good run has none.

    open_ended: replies have no end of their own, so that being cut is no sign of anything.
    """
    equal = _equal_rewards(lines, options)
    remarks = [equal or _nothing_learned(lines, options), _unjudged(lines, options)]
    if not open_ended:
        remarks.append(_cut(lines, options))
    return [remark for remark in remarks if remark]


def _equal_rewards(lines: Lines, options: RunOptions) -> str:
    """No completion was better than another: GRPO compares within a prompt, the others all of a step."""
    if isinstance(options, ExpertOptions):  # what is kept is imitated, however many are as good
        return ""
    if isinstance(options, GRPOOptions):
        values, where = [1 - x for x in _values(lines, "frac_reward_zero_std")], "every group"
    else:
        values, where = _values(lines, "reward_std"), "the completions"
    if not values or max(values) > _EQUAL:
        return ""
    last = _values(lines, "reward")[-1]
    return (
        f"all rewards of {where} were equal in {_steps(values)} ({last:.4g} on average at the end): nothing was "
        "learned from them; look at the replies and the reward, or take problems that the model gets right now and then"
    )


def _nothing_learned(lines: Lines, options: RunOptions) -> str:
    gradients, losses = _values(lines, "grad_norm"), _values(lines, "loss")
    if gradients and not any(gradients):
        said = "loss and gradient were" if losses and not any(losses) else "the gradient was"
        return f"{said} 0 in {_steps(gradients)}: nothing was learned"
    # Where advantages add up to 0, so does a loss that has a gradient.
    if losses and not any(losses) and not isinstance(options, RLOptions):
        return f"the loss was 0 in {_steps(losses)}: nothing was learned"
    return ""


def _unjudged(lines: Lines, options: RunOptions) -> str:
    """Errors of rewards; with the greedy baseline one more reply of each prompt is judged."""
    judged = [line for line in lines if "reward/errors" in line]
    if not isinstance(options, RLOptions) or not judged:
        return ""
    width = options.num_generations + (getattr(options, "baseline", None) == "greedy")
    total = sum(int(line.get("rollout/prompts_tried", options.num_prompts)) * width for line in judged)
    errors, late = (int(sum(_values(judged, f"reward/{name}"))) for name in ("errors", "timeouts"))
    if errors < MOST * total:
        return ""
    timeouts = f", {late} of them for want of time (reward_timeout {options.reward_timeout:g} s)" if late else ""
    return f"{errors:,} of {total:,} completions could not be judged{timeouts}: the run learned from the rest alone"


def _cut(lines: Lines, options: RunOptions) -> str:
    shares = _values(lines, "completions/clipped_ratio")
    share = sum(shares) / len(shares) if shares else 0.0
    if share < MOST:
        return ""
    longest = getattr(options, "max_completion_length", None)
    masked = getattr(options, "truncated", None) == "mask"
    what = "they were left out of the loss" if masked else "what was learned from are unfinished replies"
    return f"{share:.0%} of the completions were cut at max_completion_length {longest}: {what}; raise it"


def _values(lines: Lines, name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def _steps(values: Sequence[float]) -> str:
    return f"all {len(values)} steps" if len(values) > 1 else "the only step"
