"""Options of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upslope.errors import ConfigError
from upslope.options.common import Named, RunOptions, check, column_names


@dataclass(frozen=True, kw_only=True)
class SFTOptions(RunOptions):
    """Supervised fine-tuning: maximum likelihood of completions, token-masked and packed."""

    data: str | None = None
    """Training rows: a .jsonl/.csv/.parquet/.txt file or a hub id. Give this or --task."""
    eval_data: str | None = None
    """Held-out rows in the same forms; left out with --data: the last tenth of the data."""
    columns: tuple[str, ...] = ()
    """What the rows' own columns are, as in prompt=question completion=answer; left out: those names themselves."""
    task: Named | None = None
    """Train on the demonstrations of a task, and measure its accuracy on held-out problems."""
    num_examples: int = 1000
    """How many demonstrations to take from --task."""
    batch_size: int = 16
    """Sequences per optimizer step."""
    num_epochs: float | None = None
    """Passes over the data; when given it sets max_steps."""
    loss: Literal["nll", "dft"] = "nll"
    """nll: negative log-likelihood; dft: each token's weighted by its own probability (arXiv 2508.05629)."""
    label_smoothing: float = 0.0
    """Share of every target spread evenly over the vocabulary (arXiv 1512.00567); 0 is off."""
    max_length: int = 1024
    """Longest sequence in tokens; longer rows, and those beyond the context, are dropped and counted."""
    max_completion_length: int = 32
    """Longest reply in tokens when --task accuracy is measured."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range."""
        RunOptions.validate(self)
        check(
            self,
            num_examples=(1, None),
            batch_size=(1, None),
            label_smoothing=(0, 1),
            max_length=(2, None),
            max_completion_length=(1, None),
            num_epochs=(0, None),
        )
        column_names(self.columns)
        if (self.data is None) == (self.task is None):
            raise ConfigError("give exactly one of --data and --task")
        if self.columns and self.data is None:
            raise ConfigError("columns is about the rows of data: leave it out with task")
        if self.loss == "dft" and self.label_smoothing:
            raise ConfigError("label_smoothing belongs to loss = nll: dft has no smoothed form; set it to 0 with dft")
