"""What `--dry-run` asks of a task and its rewards: everything the run will, once, with the run's own errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from upslope.build import Policy
from upslope.evaluation.accuracy import evaluate
from upslope.loop.kept import Kept
from upslope.loop.prompts import held_out_of
from upslope.options import DistillOptions, SFTOptions
from upslope.rewards.judge import Judge
from upslope.tasks.base import Task
from upslope.types import Completion, Prompt, Reward, Rollout, RolloutGroup

__all__ = ["Judged", "check_held_out", "judge_one"]


@dataclass(frozen=True, slots=True)
class Judged:
    """The judgement of real completions of one prompt: the first that was judged, and how many could not be."""

    completion: str
    reward: Reward
    judged: int
    errors: int
    first_error: str
    seconds: float

    @property
    def words(self) -> tuple[str, ...]:
        """For the terminal."""
        parts = ", ".join(f"{name} {value:.4g}" for name, value in self.reward.parts.items())
        found = f"Reward of the completion {self.completion!r:.80}: {self.reward.value:.4g}" + (
            f" ({parts})" if parts else ""
        )
        timed = f"{found}; {self.judged} judged in {self.seconds:.2f} s."
        return (timed, f"{self.errors} of them could not be judged: {self.first_error}") if self.errors else (timed,)

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "reward": self.reward.value, "parts": dict(self.reward.parts)}


def judge_one(judge: Judge, prompt: Prompt, tokens: Sequence[int], completions: Sequence[Completion]) -> Judged:
    """Have one prompt's completions judged as the run will. DataError: not one of them could be."""
    rollouts = [Rollout.from_completion(tokens, completion, i) for i, completion in enumerate(completions)]
    said = judge.judge([RolloutGroup(prompt, rollouts)])
    known = next(r for r in rollouts if r.reward.value is not None)
    errors = [r.reward.error or "not judged" for r in rollouts if r.reward.value is None]
    return Judged(known.text, known.reward, len(rollouts), len(errors), "".join(errors[:1]), said["reward/seconds"])


def check_held_out(options: SFTOptions | DistillOptions, policy: Policy, task: Task) -> Kept[Prompt] | None:
    """The held-out problems a supervised run measures, after two were answered and judged as it will do it.

    DataError: fewer exist, none fits the model, or there is no verdict.
    """
    o = options
    held_out, _ = held_out_of(task, policy, o.eval_samples, o.max_completion_length)
    if held_out is not None:
        from upslope.recipes.sft import held_out_groups

        evaluate(held_out_groups(policy, task, min(2, o.eval_samples), o.max_completion_length))
    return held_out
