"""Whole recipes on a tiny random model: they learn, they repeat, they say what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from upslope.build import load_policy
from upslope.errors import ConfigError, DataError, ModelError, RunError, UpslopeError
from upslope.models.files.weights import load as load_weights
from upslope.options import GRPOOptions, PPOOptions, SFTOptions
from upslope.recipes.grpo import GRPO, grpo
from upslope.recipes.ppo import PPO, ppo
from upslope.recipes.sft import sft
from upslope.runs.folder import Run

TASK = """
from upslope.tasks.base import Task, chat_prompt, select_prompts
from upslope.types import Message, Reward


class Letter(Task):
    name = "letter"

    def prompts(self, split, n, *, seed):
        return select_prompts((chat_prompt(f"Say {i}", answer="a") for i in range(500)), split, n, name=self.name)

    def rewards(self, prompts, completions):
        return [Reward(text.count("a") / 4, {"a": text.count("a") / 4}, correct="a" in text) for text in completions]

    def demonstration(self, prompt):
        return (*prompt.messages, Message("assistant", "aaaa"))
"""


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "letter.py"
    path.write_text(TASK)
    return f"{path}:Letter"


def rl(tiny: Path, task: str, folder: Path, **changes: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "model": str(tiny),
        "task": task,
        "output_dir": str(folder),
        "num_train_prompts": 40,
        "num_prompts": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "eval_samples": 8,
        "eval_every": 0,
        "learning_rate": 3e-3,
        "dtype": "float32",
    }
    return common | changes


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"eval/' not in line]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "separate critic": {"critic": "separate"},
    "kl in the reward": {"kl_coef": 0.05, "kl_target": 1.0},
    "kl in the loss": {"kl_coef": 0.05, "kl_placement": "loss"},
    "adapters with kl": {"lora_rank": 4, "kl_coef": 0.05},
    "minibatches": {"num_minibatches": 2, "num_epochs": 3, "target_kl": 0.5, "rollout_kl_coef": 0.1},
    "entropy and dual clip": {"entropy_coef": 0.01, "dual_clip": 3.0, "value_clip": 0.2, "epsilon_high": 0.3},
    "bootstrap": {"truncated": "bootstrap", "missing_eos_penalty": 0.1, "overlong_buffer": 2},
    "value first": {"value_pretraining_steps": 2},
    "value apart from the trunk": {"vf_coef": 0.0},
    "bfloat16": {"dtype": "bfloat16"},
    "filtered with correction": {"top_k": 20, "rollout_correction": "sequence"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ppo_runs_on_policy(variant: str, tiny: Path, task: str, tmp_path: Path) -> None:
    summary = ppo(PPOOptions(**rl(tiny, task, tmp_path / "run", **VARIANTS[variant])))
    assert summary["steps"] == 3
    moved = [line for line in lines(tmp_path / "run") if "policy/approx_kl" in line]
    assert len(moved) == 3 - VARIANTS[variant].get("value_pretraining_steps", 0)
    for line in moved:
        assert line["rollout/max_logprob_diff"] == 0.0
        assert line["rollout/differing_tokens"] == 0
    with Run.open(tmp_path / "run", read_only=True) as run:
        row = run.store.rollouts(split="train", limit=1)[0]
        stored = run.store.rollout(row.id)
        assert {"values", "advantages", "returns", "old_logprobs"} <= set(stored.arrays)
        assert len(stored.arrays["values"]) == len(stored.arrays["tokens"])


def test_first_pass_has_ratio_one_and_later_passes_do_not(tiny: Path, task: str, tmp_path: Path) -> None:
    ppo(PPOOptions(**rl(tiny, task, tmp_path / "one", num_epochs=1)))
    ppo(PPOOptions(**rl(tiny, task, tmp_path / "two", num_epochs=2)))
    assert all(line["policy/approx_kl"] == 0.0 and line["val/ratio"] == 1.0 for line in lines(tmp_path / "one"))
    assert all(line["policy/approx_kl"] > 0.0 for line in lines(tmp_path / "two"))


def test_kl_to_the_reference_starts_at_exactly_zero(tiny: Path, task: str, tmp_path: Path) -> None:
    for name, rank in (("copy", 0), ("adapter", 4)):
        ppo(PPOOptions(**rl(tiny, task, tmp_path / name, kl_coef=0.1, lora_rank=rank)))
        kl = [line["objective/kl"] for line in lines(tmp_path / name)]
        assert kl[0] == 0.0
        assert kl[-1] != 0.0


GROUP_VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"normalizer": "sequence", "beta": 0.04},
    "dr_grpo": {"advantage": "dr_grpo", "normalizer": "constant"},
    "rloo": {"advantage": "rloo"},
    "reinforce++": {"advantage": "reinforce++", "num_iterations": 2, "num_minibatches": 2},
    "dapo": {"epsilon_high": 0.28, "dynamic_sampling": True, "overlong_buffer": 8, "max_completion_length": 40},
    "masked": {"truncated": "mask", "max_completion_length": 40},
    "gspo": {"loss": "gspo", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "cispo": {"loss": "cispo", "epsilon_high": 4.0, "entropy_coef": 0.01},
    "adapters": {"lora_rank": 4, "beta": 0.1},
}


@pytest.mark.parametrize("variant", GROUP_VARIANTS)
def test_grpo_runs_on_policy(variant: str, tiny: Path, task: str, tmp_path: Path) -> None:
    summary = grpo(GRPOOptions(**rl(tiny, task, tmp_path / "run", **GROUP_VARIANTS[variant])))
    assert summary["steps"] == 3
    assert all(line["rollout/max_logprob_diff"] == 0.0 for line in lines(tmp_path / "run"))


def test_ppo_and_grpo_learn(tiny: Path, task: str, tmp_path: Path) -> None:
    """From chance (an 'a' in about 2% of places) to a reward several times as large."""
    base = rl(
        tiny, task, tmp_path / "ppo", max_steps=40, num_prompts=8, num_generations=8, lr_scheduler_type="constant"
    )
    ppo(PPOOptions(**base))
    grpo(GRPOOptions(**{**base, "output_dir": str(tmp_path / "grpo"), "max_steps": 60}))
    for name in ("ppo", "grpo"):
        rewards = [line["reward"] for line in lines(tmp_path / name)]
        assert sum(rewards[:5]) / 5 < 0.1
        assert sum(rewards[-5:]) / 5 > 0.5, (name, rewards)


def test_sft_learns_and_its_folder_loads_in_transformers(tiny: Path, task: str, tmp_path: Path) -> None:
    options = SFTOptions(
        model=str(tiny),
        task=task,
        output_dir=str(tmp_path / "run"),
        num_examples=32,
        batch_size=8,
        max_steps=60,
        learning_rate=1e-2,
        eval_every=0,
        eval_samples=8,
        max_completion_length=6,
    )
    summary = sft(options)
    assert summary["evaluation"]["accuracy"]["value"] == 1.0
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(summary["model"])
    weights = load_weights(Path(summary["model"]), torch.float32)
    assert torch.equal(theirs.state_dict()["model.norm.weight"], weights["model.norm.weight"])
    policy = load_policy(replace(options, model=summary["model"]))
    assert policy.eos_token_ids == (1,)


def test_sft_gradient_does_not_depend_on_the_token_budget(tiny: Path, task: str, tmp_path: Path) -> None:
    for name, budget in (("small", 20), ("large", 4096)):
        sft(
            SFTOptions(
                model=str(tiny),
                task=task,
                output_dir=str(tmp_path / name),
                num_examples=8,
                max_steps=3,
                eval_samples=0,
                dtype="float32",
                learning_rate=1e-4,
                micro_batch_tokens=budget,
            )
        )
    small, large = (load_weights(tmp_path / n / "checkpoints/last/model", torch.float32) for n in ("small", "large"))
    for name, w in small.items():
        torch.testing.assert_close(w, large[name], rtol=1e-5, atol=1e-7)


def test_a_run_repeats_bit_for_bit(tiny: Path, task: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        ppo(PPOOptions(**rl(tiny, task, tmp_path / name, dtype="bfloat16", num_minibatches=2)))
    first, second = (load_weights(tmp_path / n / "checkpoints/last/model", torch.float32) for n in "ab")
    assert all(torch.equal(w, second[name]) for name, w in first.items())


def test_freezing_the_critic_leaves_the_policy_gradient_unchanged(tiny: Path, task: str, tmp_path: Path) -> None:
    """A separate critic's learning rate does not touch the policy in the first step."""
    for name, rate in (("still", 0.0), ("moving", 0.01)):
        ppo(PPOOptions(**rl(tiny, task, tmp_path / name, critic="separate", critic_learning_rate=rate, max_steps=1)))
    still, moving = (load_weights(tmp_path / n / "checkpoints/last/model", torch.float32) for n in ("still", "moving"))
    assert all(torch.equal(w, moving[name]) for name, w in still.items())


def test_a2c_is_ppo_with_one_pass(tiny: Path, task: str, tmp_path: Path) -> None:
    """At ratio 1 the clip never acts: any epsilon gives the same weights (arXiv 2205.09123)."""
    for name, epsilon in (("tight", 1e-6), ("wide", 10.0)):
        ppo(PPOOptions(**rl(tiny, task, tmp_path / name, num_epochs=1, epsilon=epsilon)))
    tight, wide = (load_weights(tmp_path / n / "checkpoints/last/model", torch.float32) for n in ("tight", "wide"))
    assert all(torch.equal(w, wide[name]) for name, w in tight.items())


BROKEN = """
def raises_for_some(prompts, completions):
    return [1.0 if sum(map(ord, c)) % 2 else float("nan") for c in completions]

def wrong_count(prompts, completions):
    return [1.0]

def nothing(prompts, completions):
    raise ValueError("no idea")
"""


def test_a_failing_reward_is_excluded_and_counted(tiny: Path, task: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    options = PPOOptions(
        **rl(
            tiny, task, tmp_path / "run", reward=(f"{tmp_path}/broken.py:raises_for_some",), max_steps=1, eval_samples=0
        )
    )
    ppo(options)
    line = lines(tmp_path / "run")[0]
    assert line["reward/errors"] > 0
    assert line["rollout/left_out"] == line["reward/errors"]
    assert line["reward"] == 1.0


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"reward": ("{tmp}/broken.py:wrong_count",)}, DataError, "wrong_count"),
        ({"reward": ("{tmp}/broken.py:nothing",)}, DataError, "no idea"),
        ({"task": "chain_sun"}, ConfigError, "chain_sum"),
        ({"model": "{tmp}/absent"}, ModelError, "absent"),
        ({"top_k": 5}, ConfigError, "rollout_correction"),
        ({"kl_target": 1.0}, ConfigError, "kl_coef"),
        ({"kl_target": 1.0, "kl_coef": 0.1, "kl_horizon": 1}, ConfigError, "kl_horizon = 1 is too short"),
        ({"num_prompts": 0}, ConfigError, "num_prompts"),
        ({"critic": "{tmp}/absent"}, ModelError, "absent"),
        ({"output_dir": "/proc/upslope"}, RunError, "/proc/upslope"),
        (
            {"dynamic_sampling": True, "grpo": True, "reward": ("{tmp}/broken.py:equal",)},
            UpslopeError,
            "equal|signal|different",
        ),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_input_is_one_clear_line(
    change: dict[str, Any], error: type[Exception], said: str, tiny: Path, task: str, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(
        BROKEN + "\ndef equal(prompts, completions):\n    return [1.0] * len(completions)\n"
    )

    def filled(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        return value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value

    change = {key: filled(value) for key, value in change.items()}
    kind, recipe = (GRPOOptions, grpo) if change.pop("grpo", False) else (PPOOptions, ppo)
    options = kind(**{**rl(tiny, task, tmp_path / "run"), **change})

    def checked() -> None:
        options.validate()
        recipe(options)

    with pytest.raises(error, match=said) as caught:
        checked()
    assert "\n" not in str(caught.value)


def test_non_finite_training_stops_and_keeps_the_last_checkpoint(tiny: Path, task: str, tmp_path: Path) -> None:
    options = PPOOptions(**rl(tiny, task, tmp_path / "run", max_steps=3, save_every=1))
    learner = PPO(options, load_policy(options))
    original = learner.step

    def poisoned(step: int) -> Any:
        if step == 2:
            with torch.no_grad():
                learner.policy.model.model.norm.weight[0] = float("nan")
        return original(step)

    learner.step = poisoned  # type: ignore[method-assign]
    from upslope.loop.launch import begin
    from upslope.loop.session import train

    with begin(options) as begun, pytest.raises(UpslopeError):
        train("ppo", options, learner, begun)
    weights = load_weights(tmp_path / "run/checkpoints/last/model", torch.float32)
    assert all(bool(torch.isfinite(w).all()) for w in weights.values())
    assert (tmp_path / "run/checkpoints/last").resolve().name == "step-00000002"


def test_a_failing_evaluation_still_saves_the_last_step(tiny: Path, task: str, tmp_path: Path) -> None:
    options = PPOOptions(**rl(tiny, task, tmp_path / "run", max_steps=2, save_every=100))
    learner = PPO(options, load_policy(options))

    def broken(step: int) -> Any:
        raise DataError("the judge is ill")

    learner.evaluate = broken  # type: ignore[method-assign]
    from upslope.loop.launch import begin
    from upslope.loop.session import train

    with begin(options) as begun, pytest.raises(DataError, match="ill"):
        train("ppo", options, learner, begun)
    assert (tmp_path / "run/checkpoints/last").resolve().name == "step-00000002"


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_completions_without_advantage_are_left_out_and_change_nothing(
    advantage: str, tiny: Path, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for name in ("skipping", "whole"):
        if name == "whole":
            monkeypatch.setattr(GRPO, "_with_gradient", lambda self, experience, members: (members, 1.0))
        grpo(GRPOOptions(**rl(tiny, task, tmp_path / name, advantage=advantage, max_completion_length=2)))
        found[name] = lines(tmp_path / name)
    assert any(0 < line["rollout/skipped"] < 1 for line in found["skipping"])
    for ours, whole in zip(found["skipping"], found["whole"], strict=True):
        for key in ("loss", "grad_norm", "reward", "val/ratio", "policy/approx_kl"):
            assert ours[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-7), key
