"""Every shipped TOML loads into the options of the verb in its name, and has a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from upslope import options
from upslope.config import load
from upslope.preview.plan import plan_of
from upslope.recipes import CLASSES
from upslope.tasks.base import load_task

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").rglob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configuration_loads(path: Path) -> None:
    loaded = load(CLASSES[path.stem.partition("_")[0]], path)
    assert plan_of(loaded, examples=100).words
    if getattr(loaded, "task", None) is not None:
        load_task(loaded.task)


def test_there_is_one_for_every_recipe() -> None:
    assert {p.stem.partition("_")[0] for p in CONFIGS} == set(CLASSES)


def test_plan_by_hand() -> None:
    plan = plan_of(options.PPOOptions(num_prompts=6, num_generations=4, num_epochs=3, num_minibatches=2, max_steps=10))
    assert plan.sequences_per_step == 24
    assert plan.optimizer_steps_per_step == 6
    assert plan.optimizer_steps == 60
    assert plan.new_tokens_per_step == 24 * 32
    assert any("no reference model" in line for line in plan.words)
