"""Options of the verbs that train nothing by themselves."""

from __future__ import annotations

from dataclasses import dataclass

from upslope.config import option
from upslope.options.common import JsonOptions


@dataclass(frozen=True, kw_only=True)
class DemoOptions(JsonOptions):
    """Base model, then supervised learning, then PPO on one verifiable task, with held-out accuracy of each."""

    output_dir: str | None = None
    """Folder of the demo; default: a new folder under runs/."""
    model: str = "smollm2-135m"
    """Where the demo starts."""
    task: str = (
        "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=2,ask={expression} =,system=Calculate.,instruction="
    )
    """A task with demonstrations and a verdict."""
    eval_samples: int = option(512, 1)
    """Held-out problems on which every stage is measured (at least 500 for the intervals to mean something)."""
    sft_steps: int = option(12, 1)
    """Supervised steps of 16 demonstrations."""
    ppo_steps: int = option(28, 1)
    """PPO steps."""
    seed: int = 0
    """Of everything."""


@dataclass(frozen=True, kw_only=True)
class FetchOptions(JsonOptions):
    """Bring a model into the cache."""

    model: str = "smollm2-135m"
    """A hub id, a .gguf file, or the alias smollm2-135m."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(JsonOptions):
    """What this machine has, what would run on it, and whether the numbers hold here."""

    numerics: bool = False
    """Run the product's own checks: gradients, GAE, invariances, sampler against trainer, resume."""


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(JsonOptions):
    """Say in words what a configuration would do: batch arithmetic, passes, what is loaded."""

    verb: str = "ppo"
    """Which training verb the configuration is for."""
    config: str | None = None
    """Its TOML file; default: none, the options as they are."""


@dataclass(frozen=True, kw_only=True)
class RunsOptions(JsonOptions):
    """List runs, or show one."""

    folder: str = "runs"
    """A folder of runs, or one run."""
