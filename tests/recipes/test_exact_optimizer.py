"""What every supervised recipe shares, as its optimizer gets it in a run: rates, clipping, decay, budgets, adapters."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import Taken, watch
from supervised_kit import (
    LEARNERS,
    assert_adamw,
    network_of,
)

pytestmark = pytest.mark.usefixtures("in_float64")

RATES: dict[str, list[float]] = {
    "constant": [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0],
    "linear": [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25],
    "cosine": [1 / 3, 2 / 3, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2],
}
"""Of six steps, two of them warm-up: the peak is at the third, and one after the last would be 0."""
RECIPES = sorted(LEARNERS)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", RATES)
def test_every_step_is_adamws_at_its_rate_with_clipping_and_decay(kind: str, recipe: str, tmp_path: Path) -> None:
    """The whole accumulated gradient is clipped, once; matrices decay, norms and biases do not; a head has its rate."""
    head = {"head_lr_factor": 5.0} if recipe in ("classify", "tag") else {}
    changes = {"lr_scheduler_type": kind, "warmup_steps": 2, "max_steps": 6, "weight_decay": 0.5, **head}
    learner = LEARNERS[recipe](tmp_path, max_grad_norm=0.5, micro_batch_tokens=16, **changes)
    network, steps, clipped = network_of(learner), watch(learner.optimizer), 0
    for step in range(6):
        result = learner.step(step)
        assert result.metrics["learning_rate"] == steps[step].learning_rate
        squares = sum(float(g.square().sum()) for g in steps[step].gradients.values())
        assert result.metrics["grad_norm"] == pytest.approx(math.sqrt(squares))
        clipped += squares > 0.25
    assert [taken.learning_rate for taken in steps] == pytest.approx([1e-2 * rate for rate in RATES[kind]])
    assert clipped
    assert_adamw(
        steps,
        {name: p.detach() for name, p in network.named_parameters()},
        max_norm=0.5,
        decay=0.5,
        factor=lambda name: 5.0 if head and is_head(name) else 1.0,
    )


def is_head(name: str) -> bool:
    """Of BERT with a head on it; what pools the trunk's states belongs to the head."""
    return name.startswith(("classifier.", "bert.pooler."))


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_clipping_without_a_limit(recipe: str, tmp_path: Path) -> None:
    learner = LEARNERS[recipe](tmp_path, max_grad_norm=0.0)
    steps = watch(learner.optimizer)
    learner.step(0)
    learner.step(1)
    after = {name: p.detach() for name, p in network_of(learner).named_parameters()}
    assert_adamw(steps, after, max_norm=0.0, decay=0.0)


def block_of(network: torch.nn.Module) -> torch.nn.Module:
    """The first layer: what is computed twice when activations are recomputed."""
    return next(m for name, m in network.named_modules() if name.endswith(("layers.0", "layer.0")))


def first_step(recipe: str, folder: Path, **changes: Any) -> tuple[Taken, int, int]:
    """The step, how many passes the network made in it, and how often a layer was computed."""
    learner = LEARNERS[recipe](folder, **changes)
    network, calls = network_of(learner), Counter[str]()
    run = network.network if hasattr(network, "network") else network
    run.register_forward_pre_hook(lambda *_: calls.update(["pass"]))
    for name, part in block_of(network).named_modules():
        part.register_forward_pre_hook(lambda *_, name=name: calls.update([f"layer {name}"]))
    steps = watch(learner.optimizer)
    learner.step(0)
    return steps[0], calls.pop("pass"), max(calls.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_memory_is_saved_without_another_gradient(recipe: str, tmp_path: Path) -> None:
    """Small micro-batches make more passes, gradient checkpointing computes a layer twice in each."""
    plain, passes, layers = first_step(recipe, tmp_path)
    assert passes <= layers
    other = {"small": {"micro_batch_tokens": 12}, "again": {"gradient_checkpointing": True}}
    for name, changes in other.items():
        found, more, computed = first_step(recipe, tmp_path, **changes)
        assert more > passes if name == "small" else more == passes
        assert computed == more if name == "small" else computed == 2 * layers
        assert found.gradients.keys() == plain.gradients.keys()
        for key, gradient in plain.gradients.items():
            torch.testing.assert_close(found.gradients[key], gradient, rtol=1e-9, atol=1e-12, msg=f"{name} {key}")
