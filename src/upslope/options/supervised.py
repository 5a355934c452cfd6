"""Options of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from upslope.errors import ConfigError
from upslope.options.common import RunOptions, check


@dataclass(frozen=True, kw_only=True)
class SFTOptions(RunOptions):
    """Supervised fine-tuning: maximum likelihood of completions, token-masked and packed."""

    data: str | None = None
    """Training rows: a .jsonl/.csv/.parquet/.txt file or a hub id. Give this or --task."""
    eval_data: str | None = None
    """Held-out rows in the same forms; left out with --data: the last tenth of the data."""
    task: str | None = None
    """Train on the demonstrations of a task, and measure its accuracy on held-out problems."""
    num_examples: int = 1000
    """How many demonstrations to take from --task."""
    batch_size: int = 16
    """Sequences per optimizer step."""
    num_epochs: float | None = None
    """Passes over the data; when given it sets max_steps."""
    max_length: int = 1024
    """Longest sequence in tokens; longer rows are dropped, counted and reported."""
    max_completion_length: int = 32
    """Longest reply in tokens when --task accuracy is measured."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range."""
        RunOptions.validate(self)
        check(
            self,
            num_examples=(1, None),
            batch_size=(1, None),
            max_length=(2, None),
            max_completion_length=(1, None),
            num_epochs=(0, None),
        )
        if (self.data is None) == (self.task is None):
            raise ConfigError("give exactly one of data and task")
