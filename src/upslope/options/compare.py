"""Options of the comparison of recipes."""

from __future__ import annotations

from dataclasses import dataclass

from upslope.errors import ConfigError
from upslope.options.common import check


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Run recipes from the same weights on the same budget with several seeds, and write one report."""

    configs: tuple[str, ...] = ()
    """Two or more TOML files called VERB_name.toml, as in `upslope compare sft_a.toml ppo_b.toml`."""
    seeds: int = 5
    """Runs per recipe, with seeds counted up from --seed."""
    seed: int = 0
    """The first seed."""
    max_seconds: float | None = None
    """Training seconds that every run may spend. Give this or --max-tokens."""
    max_tokens: int | None = None
    """Trained tokens that every run may spend."""
    model: str | None = None
    """Start weights of all recipes; left out: the files must agree on theirs."""
    task: str | None = None
    """Task of all recipes; left out: the files must agree on theirs."""
    eval_samples: int = 200
    """Held-out problems on which every run is measured at its end."""
    samples_shown: int = 12
    """Held-out problems whose replies stand side by side in the report."""
    output_dir: str | None = None
    """Folder of the comparison; left out: a new folder under runs/."""
    resume: bool = False
    """Continue the comparison in --output-dir: finished runs are kept, the unfinished one is resumed."""
    json: bool = False
    """Print the comparison as one JSON object on standard output."""

    def validate(self) -> None:
        """Raise ConfigError for fewer than two files, no single budget, or a value out of range."""
        check(
            self,
            seeds=(1, None),
            max_seconds=(0, None),
            max_tokens=(1, None),
            eval_samples=(1, None),
            samples_shown=(0, None),
        )
        if len(self.configs) < 2:
            raise ConfigError("compare needs two or more configurations: upslope compare sft_a.toml ppo_b.toml")
        if (self.max_seconds is None) == (self.max_tokens is None):
            raise ConfigError("give exactly one of max_seconds and max_tokens: the budget that all runs share")
        if self.resume and self.output_dir is None:
            raise ConfigError("resume needs output_dir: name the comparison to continue")
