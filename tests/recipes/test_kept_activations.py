"""Recipes that start their updates from the sampler's activations: the runs are those that compute them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.test_recipes import lines, rl, task
from upslope import kernels
from upslope.models.files.weights import load
from upslope.options import GRPOOptions, PPOOptions, ReinforceOptions
from upslope.recipes.grpo import grpo
from upslope.recipes.ppo import ppo
from upslope.recipes.reinforce import reinforce

__all__ = ["task"]

pytestmark = pytest.mark.skipif(kernels.problem() is not None, reason=f"no kernels here: {kernels.problem()}")

VERBS: dict[str, tuple[Any, Any]] = {
    "ppo": (ppo, PPOOptions),
    "grpo": (grpo, GRPOOptions),
    "reinforce": (reinforce, ReinforceOptions),
}
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("ppo", {"dtype": "bfloat16", "kl_coef": 0.05, "num_minibatches": 2, "num_epochs": 2}),
    ("ppo", {"critic": "separate", "truncated": "bootstrap", "entropy_coef": 0.01}),
    ("ppo", {"value_pretraining_steps": 1, "temperature": 0.7}),
    ("grpo", {"dtype": "bfloat16", "beta": 0.04, "num_iterations": 2, "micro_batch_tokens": 64}),
    (
        "grpo",
        {"dynamic_sampling": True, "dynamic_sampling_rounds": 64, "num_generations": 32}
        | {"truncated": "mask", "max_completion_length": 40},
    ),
    ("reinforce", {"baseline": "greedy"}),
]
OF_ONE = ("rollout/replayed", "rollout/max_logprob_diff", "rollout/mean_logprob_diff", "rollout/differing_tokens")


@pytest.mark.parametrize(("verb", "changes"), RUNS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_the_run_is_the_same(verb: str, changes: dict[str, Any], tiny: Path, task: str, tmp_path: Path) -> None:
    recipe, options = VERBS[verb]
    found = []
    for name, gb in (("kept", None), ("computed", 0.0)):
        recipe(options(**rl(tiny, task, tmp_path / name, activations_gb=gb, max_steps=3, **changes)))
        weights = load(tmp_path / name / "checkpoints" / "last" / "model", torch.float32)
        metrics = [
            {k: v for k, v in line.items() if "second" not in k and k not in OF_ONE and "time" not in k}
            for line in lines(tmp_path / name)
        ]
        found.append((weights, metrics))
    assert found[0][1] == found[1][1]
    for name, weight in found[0][0].items():
        assert torch.equal(weight, found[1][0][name]), name
    for line in lines(tmp_path / "kept"):
        assert line["rollout/replayed"] == 1.0
        assert line["rollout/max_logprob_diff"] == 0.0
    assert all("rollout/replayed" not in line for line in lines(tmp_path / "computed"))


def test_a_step_with_too_little_room_is_computed(tiny: Path, task: str, tmp_path: Path) -> None:
    ppo(PPOOptions(**rl(tiny, task, tmp_path / "run", activations_gb=1e-5)))
    for line in lines(tmp_path / "run"):
        assert "rollout/replayed" not in line
        assert line["rollout/max_logprob_diff"] == 0.0


def test_a_sampler_that_is_not_the_trainer_is_found(
    tiny: Path, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one member that goes through the network again tells, where all others are taken over."""
    from upslope.models.decoder.fast import PreparedDecoder

    honest = PreparedDecoder.forward

    def slightly_wrong(self: Any, *arguments: Any) -> torch.Tensor:
        return honest(self, *arguments) * 1.01

    monkeypatch.setattr(PreparedDecoder, "forward", slightly_wrong)
    ppo(PPOOptions(**rl(tiny, task, tmp_path / "run")))
    assert all(line["rollout/max_logprob_diff"] > 0 for line in lines(tmp_path / "run"))
