"""Options of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import BatchOptions, RowOrTaskOptions, RunOptions


@dataclass(frozen=True, kw_only=True)
class SFTOptions(RunOptions, RowOrTaskOptions, BatchOptions):
    """Supervised fine-tuning: maximum likelihood of completions, token-masked and packed."""

    FIRST = "data task model learning_rate batch_size num_epochs max_steps max_length lora_rank output_dir"

    num_examples: int = option(1000, 1, also="num_train_prompts")
    """How many demonstrations to take from --task."""
    loss: Literal["nll", "dft"] = "nll"
    """nll: negative log-likelihood; dft: each token's weighted by its own probability (arXiv 2508.05629)."""
    label_smoothing: float = option(0.0, 0, 1)
    """Share of every target spread evenly over the vocabulary (arXiv 1512.00567); 0 is off."""
    max_completion_length: int = option(32, 1)
    """Longest reply in tokens when --task accuracy is measured."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range."""
        super().validate()
        if self.loss == "dft" and self.label_smoothing:
            raise ConfigError("label_smoothing belongs to loss = nll: dft has no smoothed form; set it to 0 with dft")
