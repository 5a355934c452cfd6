"""What `--dry-run` asks of a task and its rewards: everything the run will, once, with the run's own errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from upslope.build import Policy
from upslope.data.chat import encode_prompt
from upslope.data.template import Tools
from upslope.engine.request import check_prompt
from upslope.errors import DataError
from upslope.evaluation.accuracy import evaluate
from upslope.options import DistillOptions, RLOptions, SFTOptions
from upslope.rollout.judge import Scorer
from upslope.tasks.base import Split, Task
from upslope.types import Completion, Prompt, Reward, Rollout, RolloutGroup

__all__ = ["Asked", "Judged", "ask", "check_held_out", "encode_all", "judge_one"]


@dataclass(frozen=True, slots=True)
class Asked:
    """The problems of a run: those to train on, each with its tokens, and how many are held out.

    crowded: how many leave less than max_completion_length tokens of the model's context for the reply.
    """

    prompts: list[Prompt]
    tokens: list[list[int]]
    held_out: int
    crowded: int

    @property
    def words(self) -> tuple[str, ...]:
        """For the terminal."""
        longest = max(map(len, self.tokens))
        found = (
            f"{len(self.prompts):,} problems to train on and {self.held_out:,} held out; the longest: {longest} tokens."
        )
        if not self.crowded:
            return (found,)
        return (
            found,
            f"{self.crowded:,} of them leave the reply less of the model's context than max_completion_length.",
        )


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


def ask(options: RLOptions, policy: Policy, task: Task) -> Asked:
    """All the prompts that the run asks the task for. DataError: fewer exist, or one does not fit the model."""
    longest = options.max_completion_length
    prompts = task.prompts("train", options.num_train_prompts, seed=options.seed)
    tokens, crowded = encode_all(policy, prompts, "train", longest)
    held_out = task.prompts("eval", options.eval_samples, seed=0) if options.eval_samples else []
    for line in task.remarks():
        print(line, file=sys.stderr)
    _, more = encode_all(policy, held_out, "eval", longest)
    return Asked(prompts, tokens, len(held_out), crowded + more)


def encode_all(
    policy: Policy, prompts: Sequence[Prompt], split: Split, longest: int, tools: Sequence[Tools] | None = None
) -> tuple[list[list[int]], int]:
    """The prompts' tokens, and how many leave less than `longest` of the context. DataError names one too long.

    tools: those offered in each prompt; None: nowhere any.
    """
    spec, found, crowded = policy.model.spec, [], 0
    for number, (prompt, offered) in enumerate(zip(prompts, tools or [()] * len(prompts), strict=True), 1):
        tokens = encode_prompt(policy.tokenizer, prompt, tools=offered)
        try:
            check_prompt(tokens, spec.input_vocab_size, spec.max_positions)
            policy.model.check_prompt(tokens)
        except DataError as error:
            asked = prompt.text if prompt.text is not None else prompt.messages[-1].content
            raise DataError(f"{split} prompt {number} of {len(prompts)} ({asked[:40]!r}): {error}") from error
        found.append(tokens)
        crowded += policy.model.room(len(tokens)) < longest
    return found, crowded


def judge_one(judge: Scorer, prompt: Prompt, tokens: Sequence[int], completions: Sequence[Completion]) -> Judged:
    """Have one prompt's completions judged as the run will. DataError: not one of them could be."""
    rollouts = [Rollout.from_completion(tokens, completion, i) for i, completion in enumerate(completions)]
    said = judge.judge([RolloutGroup(prompt, rollouts)])
    known = next(r for r in rollouts if r.reward.value is not None)
    errors = [r.reward.error or "not judged" for r in rollouts if r.reward.value is None]
    return Judged(known.text, known.reward, len(rollouts), len(errors), "".join(errors[:1]), said["reward/seconds"])


def check_held_out(options: SFTOptions | DistillOptions, policy: Policy, task: Task) -> int:
    """How many held-out problems a supervised run measures, after two were answered and judged as it will do it.

    DataError: fewer exist, one does not fit the model, or there is no verdict.
    """
    if not options.eval_samples:
        return 0
    from upslope.recipes.sft import held_out_groups

    prompts = task.prompts("eval", options.eval_samples, seed=0)
    encode_all(policy, prompts, "eval", options.max_completion_length)
    evaluate(held_out_groups(policy, task, min(2, len(prompts)), options.max_completion_length))
    return len(prompts)
