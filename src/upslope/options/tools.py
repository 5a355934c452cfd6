"""Options of the verbs that train nothing by themselves."""

from __future__ import annotations

from dataclasses import dataclass

from upslope.options.common import check


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Base model, then supervised learning, then PPO on one verifiable task, with held-out accuracy of each."""

    output_dir: str | None = None
    """Folder of the demo; left out: a new folder under runs/."""
    model: str = "smollm2-135m"
    """Where the demo starts."""
    task: str = (
        "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=2,ask={expression} =,system=Calculate.,instruction="
    )
    """A task with demonstrations and a verdict."""
    eval_samples: int = 512
    """Held-out problems on which every stage is measured (at least 500 for the intervals to mean something)."""
    sft_steps: int = 12
    """Supervised steps of 16 demonstrations."""
    ppo_steps: int = 28
    """PPO steps."""
    seed: int = 0
    """Of everything."""
    json: bool = False
    """Print summary.json on standard output."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range."""
        check(self, eval_samples=(1, None), sft_steps=(1, None), ppo_steps=(1, None))


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Bring a model into the cache."""

    model: str = "smollm2-135m"
    """A hub id, a .gguf file, or the alias smollm2-135m."""
    json: bool = False
    """Print the folder and where it came from as JSON."""

    def validate(self) -> None:
        """Nothing to check."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """What this machine has, what would run on it, and whether the numbers hold here."""

    numerics: bool = False
    """Run the product's own checks: gradients, GAE, invariances, sampler against trainer, resume."""
    json: bool = False
    """Print one JSON object."""

    def validate(self) -> None:
        """Nothing to check."""


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """Say in words what a configuration would do: batch arithmetic, passes, what is loaded."""

    verb: str = "ppo"
    """Which training verb the configuration is for."""
    config: str | None = None
    """Its TOML file; left out: the defaults."""
    json: bool = False
    """Print one JSON object."""

    def validate(self) -> None:
        """Nothing to check."""


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """List runs, or show one."""

    folder: str = "runs"
    """A folder of runs, or one run."""
    json: bool = False
    """Print one JSON object."""

    def validate(self) -> None:
        """Nothing to check."""
