"""What a run says at its end: a sentence for what went wrong all along, none for a good run, the whole run counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from upslope.loop.closing import last_words
from upslope.options import (
    DistillOptions,
    ExpertOptions,
    GRPOOptions,
    PPOOptions,
    ReinforceOptions,
    RunOptions,
    SFTOptions,
)

GOOD: dict[str, float] = {
    "loss": 0.4,
    "grad_norm": 0.9,
    "reward": 0.4,
    "reward_std": 0.3,
    "frac_reward_zero_std": 0.5,
    "reward/errors": 1.0,
    "reward/timeouts": 0.0,
    "completions/clipped_ratio": 0.2,
}
RL: dict[str, Any] = {"num_prompts": 4, "num_generations": 4, "max_completion_length": 64}


def said(options: RunOptions, steps: int = 30, **changed: float) -> list[str]:
    return last_words([{"step": i + 1, **GOOD, **changed} for i in range(steps)], options)


@pytest.mark.parametrize("options", [SFTOptions(), GRPOOptions(**RL), PPOOptions(**RL), DistillOptions()])
def test_a_good_run_and_one_without_steps_say_nothing(options: RunOptions) -> None:
    assert said(options) == []
    assert last_words([], options) == []
    assert last_words([{"step": 1}], options) == []


def test_a_loss_of_zero() -> None:
    assert said(SFTOptions(), loss=0.0) == ["the loss was 0 in all 30 steps: nothing was learned"]
    assert said(SFTOptions(), loss=0.0, grad_norm=0.0) == [
        "loss and gradient were 0 in all 30 steps: nothing was learned"
    ]
    assert said(PPOOptions(**RL), loss=0.0) == []  # advantages that add up to 0
    assert said(PPOOptions(**RL), steps=1, grad_norm=0.0) == [
        "the gradient was 0 in the only step: nothing was learned"
    ]
    one = [{**GOOD, "loss": 0.0} for _ in range(29)] + [GOOD]
    assert last_words(one, SFTOptions()) == []


def test_equal_rewards_are_named_as_the_cause() -> None:
    (grpo,) = said(GRPOOptions(**RL), frac_reward_zero_std=1.0, reward=0.0, grad_norm=0.0, loss=0.0)
    assert grpo.startswith(
        "all rewards of every group were equal in all 30 steps (0 on average at the end): nothing was learned from them"
    )
    assert said(PPOOptions(**RL), frac_reward_zero_std=1.0) == []  # a critic compares prompts, too
    (ppo,) = said(PPOOptions(**RL), reward_std=1e-17, reward=0.1)
    assert said(ExpertOptions(**RL), reward_std=0.0) == []
    assert ppo.startswith("all rewards of the completions were equal in all 30 steps (0.1 on average at the end)")


def test_cut_completions() -> None:
    (cut,) = said(GRPOOptions(**RL), **{"completions/clipped_ratio": 0.97})
    assert cut == (
        "97% of the completions were cut at max_completion_length 64: what was learned from are unfinished replies; "
        "raise it"
    )
    (masked,) = said(GRPOOptions(**RL, truncated="mask"), **{"completions/clipped_ratio": 0.5})
    assert "50% of the completions" in masked
    assert "left out of the loss" in masked
    assert said(GRPOOptions(**RL), **{"completions/clipped_ratio": 0.49}) == []
    assert last_words([{**GOOD, "completions/clipped_ratio": 1.0}], GRPOOptions(**RL), open_ended=True) == []


def test_rewards_that_could_not_be_computed() -> None:
    (errors,) = said(GRPOOptions(**RL), **{"reward/errors": 12.0, "reward/timeouts": 5.0})
    assert errors == (
        "360 of 480 completions could not be judged, 150 of them for want of time (reward_timeout 10 s): the run "
        "learned from the rest alone"
    )
    assert said(GRPOOptions(**RL), **{"reward/errors": 12.0, "rollout/prompts_tried": 8.0}) == []
    assert len(said(ReinforceOptions(**RL), **{"reward/errors": 9.0})) == 1
    assert said(ReinforceOptions(**RL, baseline="greedy"), **{"reward/errors": 9.0}) == []


TASK = """
from dataclasses import replace
from upslope.tasks import Task, chat_prompt
class Zero(Task):
    name = "zero"
    inline_safe = True
    def prompts(self, split, n, *, seed):
        return [replace(chat_prompt(f"{split} {i}"), key=i) for i in range(n)]
    def rewards(self, prompts, completions):
        return [0.0] * len(prompts)
"""


def test_a_run_says_it_on_standard_error_and_in_its_summary_and_a_resume_counts_it_all(
    tiny: Path, tmp_path: Path, capsys
) -> None:
    from upslope.cli import main

    (tmp_path / "zero.py").write_text(TASK)
    run = tmp_path / "run"
    arguments = [
        *("grpo", "--model", str(tiny), "--task", f"{tmp_path / 'zero.py'}:Zero", "--output-dir", str(run)),
        *("--num-prompts", "2", "--num-generations", "2", "--num-train-prompts", "4", "--eval-samples", "0"),
        *("--max-completion-length", "2"),
    ]
    assert main([*arguments, "--max-steps", "2"]) == 0
    remarks = json.loads((run / "summary.json").read_text())["remarks"]
    assert remarks[0].startswith("all rewards of every group were equal in all 2 steps (0 on average at the end)")
    assert remarks[1].startswith("100% of the completions were cut at max_completion_length 2")
    lines = capsys.readouterr().err.partition("\ngrpo: max_steps: ")[0].splitlines()
    assert lines[-2:] == [f"grpo: {remark}" for remark in remarks]
    assert main([*arguments, "--max-steps", "3", "--resume"]) == 0
    remarks = json.loads((run / "summary.json").read_text())["remarks"]
    assert remarks[0].startswith("all rewards of every group were equal in all 3 steps")
