"""Options of the comparison of recipes."""

from __future__ import annotations

from dataclasses import dataclass

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import JsonOptions


@dataclass(frozen=True, kw_only=True)
class CompareOptions(JsonOptions):
    """Run recipes from the same weights on the same budget with several seeds, and write one report."""

    configs: tuple[str, ...] = ()
    """Two or more TOML files called VERB_name.toml, as in `upslope compare sft_a.toml ppo_b.toml`."""
    seeds: int = option(5, 1)
    """Runs per recipe, with seeds counted up from --seed."""
    seed: int = 0
    """The first seed."""
    max_seconds: float | None = option(None, 0)
    """Training seconds that every run may spend. Give this or --max-tokens."""
    max_tokens: int | None = option(None, 1)
    """Trained tokens that every run may spend."""
    model: str | None = None
    """Start weights of all recipes; default: the files must agree on theirs."""
    task: str | None = None
    """Task of all recipes; default: the files must agree on theirs."""
    eval_samples: int = option(200, 1)
    """Held-out problems on which every run is measured at its end."""
    samples_shown: int = option(12, 0)
    """Held-out problems whose replies stand side by side in the report."""
    output_dir: str | None = None
    """Folder of the comparison; default: a new folder under runs/."""
    resume: bool = False
    """Continue the comparison in --output-dir: finished runs are kept, the unfinished one is resumed."""

    def validate(self) -> None:
        """Raise ConfigError for fewer than two files, no single budget, or a value out of range."""
        super().validate()
        if len(self.configs) < 2:
            raise ConfigError("compare needs two or more configurations: upslope compare sft_a.toml ppo_b.toml")
        if (self.max_seconds is None) == (self.max_tokens is None):
            raise ConfigError("give exactly one of max_seconds and max_tokens: the budget that all runs share")
        if self.resume and self.output_dir is None:
            raise ConfigError("resume needs output_dir: name the comparison to continue")
