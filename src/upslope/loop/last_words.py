"""What a run that has ended should not keep to itself: sentences about what went wrong all along, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from upslope.options import ExpertOptions, GRPOOptions, RLOptions, RunOptions

__all__ = ["last_words"]

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
