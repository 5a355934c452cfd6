"""LoRA folders load with peft; a reward model's folder starts a critic; targets and patience end a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_recipes import lines, rl
from tiny_model import tiny_config, tiny_folder

from upslope.build import load_critic, load_policy
from upslope.errors import ModelError
from upslope.models.attention.context import PackedContext
from upslope.models.files.weights import load as load_weights
from upslope.models.files.weights import save_folder
from upslope.options import PPOOptions
from upslope.recipes.ppo import ppo


@pytest.fixture
def length_task(tmp_path: Path) -> str:
    from test_recipes import TASK

    (tmp_path / "letter.py").write_text(TASK)
    return f"{tmp_path}/letter.py:Letter"


def test_adapter_folder_loads_with_peft_and_resumes(tiny: Path, length_task: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = rl(tiny, length_task, folder, lora_rank=4, max_steps=2, kl_coef=0.1)
    ppo(PPOOptions(**options))
    adapter = folder / "checkpoints/last/model"
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), adapter).eval()
    policy = load_policy(PPOOptions(**options))
    named = dict(policy.model.named_parameters())
    with torch.no_grad():
        for name, weight in policy.read(adapter).items():
            named[name].copy_(weight)
        assert any(float(w.abs().sum()) > 0 for n, w in named.items() if "lora_B" in n)
        tokens = torch.randint(2, 258, (20,))
        ours = policy.model.logits(policy.model(tokens, PackedContext([20])))
        torch.testing.assert_close(ours, theirs(tokens[None]).logits[0], rtol=0, atol=1e-4)

    ppo(
        PPOOptions(
            **{**options, "output_dir": str(tmp_path / "whole"), "max_steps": 4, "lr_scheduler_type": "constant"}
        )
    )
    parts = {**options, "output_dir": str(tmp_path / "parts"), "lr_scheduler_type": "constant"}
    ppo(PPOOptions(**parts))
    ppo(PPOOptions(**{**parts, "max_steps": 4, "resume": True}))
    whole, resumed = (policy.read(tmp_path / n / "checkpoints/last/model") for n in ("whole", "parts"))
    assert all(torch.equal(w, resumed[name]) for name, w in whole.items())


def reward_folder(tiny: Path, path: Path, **changes: Any) -> Path:
    config = tiny_config(**changes)
    weights = load_weights(tiny, torch.float32)
    torch.manual_seed(5)
    weights["score.weight"] = torch.randn(1, config.hidden_size)
    weights.pop("lm_head.weight", None)
    save_folder(
        path, {**config.to_hf(), "architectures": ["LlamaForSequenceClassification"]}, weights, source_folder=tiny
    )
    return path


def test_a_critic_starts_from_a_reward_model(tiny: Path, length_task: str, tmp_path: Path) -> None:
    source = reward_folder(tiny, tmp_path / "reward")
    options = PPOOptions(**rl(tiny, length_task, tmp_path / "run", critic=str(source), max_steps=1))
    critic = load_critic(load_policy(options), str(source), options)
    assert torch.equal(critic.head.score.weight, load_weights(source, torch.float32)["score.weight"])
    ppo(options)
    assert lines(tmp_path / "run")[0]["loss/value"] > 0


def test_a_critic_with_another_vocabulary_is_refused(tiny: Path, length_task: str, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", vocab_size=300)
    options = PPOOptions(**rl(tiny, length_task, tmp_path / "run", critic=str(other)))
    with pytest.raises(ModelError, match="300"):
        load_critic(load_policy(options), str(other), options)


def test_a_folder_without_a_score_is_no_critic(tiny: Path, length_task: str, tmp_path: Path) -> None:
    options = PPOOptions(**rl(tiny, length_task, tmp_path / "run", critic=str(tiny)))
    with pytest.raises(ModelError, match=r"score\.weight"):
        load_critic(load_policy(options), str(tiny), options)


@pytest.mark.parametrize(
    ("change", "said", "steps"),
    [
        ({"target": 0.0}, "target", 1),
        ({"patience": 2, "learning_rate": 0.0}, "patience", 3),
        ({"max_tokens": 100}, "max_tokens", 2),
    ],
)
def test_what_ends_a_run(
    change: dict[str, Any], said: str, steps: int, tiny: Path, length_task: str, tmp_path: Path
) -> None:
    summary = ppo(PPOOptions(**rl(tiny, length_task, tmp_path / "run", max_steps=50, eval_every=1, **change)))
    assert said in summary["stopped"]
    assert summary["steps"] == steps
