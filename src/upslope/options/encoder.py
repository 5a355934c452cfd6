"""Options of training an encoder: one label per text, one tag per word."""

from typing import Literal

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import BatchOptions, RunOptions


class EncoderOptions(RunOptions, BatchOptions):
    """Data and objective."""

    FIRST = "data model eval_data test_data learning_rate batch_size num_epochs max_steps max_length output_dir"

    model: str = "minilm"
    """Where training starts: an encoder's folder, a hub id, or the alias minilm."""
    data: str = ""
    """Training rows."""
    eval_data: str | None = None
    """Dev rows, which choose the best checkpoint; default: --eval-share of the data."""
    test_data: str | None = None
    """Test rows: checked for errors first, scored once at the end with the best checkpoint, used for nothing else."""
    eval_share: float = option(0.1, 1e-6, 0.9)
    """Share of the data held out, by seed and content, without --eval-data."""
    eval_samples: int = option(5000, 1)
    """Dev rows per evaluation, a choice by seed where there are more."""
    objective: Literal["cross_entropy", "policy_gradient", "policy_gradient_sampled"] = "cross_entropy"
    """Likelihood of the right label; expected reward in closed form; the same from sampled labels (REINFORCE)."""
    rewards: str | None = option(None, needs="objective=cross_entropy,policy_gradient,policy_gradient_sampled")
    """JSON file {right label: {said label: reward}}; default, and where it is silent: 1 for right, 0 for wrong."""
    num_samples: int = option(4, 1)
    """Labels sampled per item (K) by policy_gradient_sampled."""
    baseline: Literal["none", "mean", "leave_one_out"] = "leave_one_out"
    """Subtracted from sampled rewards: nothing, the mean of the item's samples, or that of its other samples."""
    label_smoothing: float = option(0.0, 0, 0.999, needs="objective=cross_entropy")
    """Share of cross_entropy's target spread over all labels."""
    batch_size: int = 32
    head_lr_factor: float = option(1.0, 0)
    """The head's learning rate as a multiple of --learning-rate."""
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    max_length: int = option(256, 4)
    """Longest input in tokens; longer rows are cut to it in every split, counted and reported."""

    def _check(self) -> None:
        if not self.data:
            raise ConfigError("data is missing: name the file with the training rows (--data train.csv)")
        sampled = self.objective == "policy_gradient_sampled"
        if sampled and self.num_samples < 2 and self.baseline != "none":
            raise ConfigError(f"baseline {self.baseline} needs num_samples of at least 2, it is {self.num_samples}")


class ClassifyOptions(EncoderOptions):
    """Text classification: one label per text or pair of texts."""

    data: str = ""
    """Training rows: a .csv/.jsonl/.parquet file or hub id with text and label; or a GLUE task, cola:CoLA/train.tsv."""
    objective: Literal["cross_entropy", "policy_gradient", "policy_gradient_sampled", "squared_error"] = "cross_entropy"
    """Likelihood of the right label; expected reward in closed form; the same from sampled labels (REINFORCE);
    squared_error: the labels are numbers, and the head is to give the number (regression)."""
    text_column: str = "text"
    """The column of the text."""
    label_column: str = "label"
    """The column of the label."""
    pair_column: str | None = None
    """The column of a second text (a hypothesis after its premise)."""


class TagOptions(EncoderOptions):
    """Tagging: one tag per word, entities in IOB2 or any other tags."""

    data: str = ""
    """Training sentences: a CoNLL file, one word a line with its tag, a blank line between sentences."""
    token_column: int = 0
    """The column of the word; negative counts from the last."""
    tag_column: int = -1
    """The column of the tag; negative counts from the last."""
    tag_scheme: Literal["iob2", "iob1", "none"] = "iob2"
    """iob2: checked; iob1: checked and turned into iob2; none: any tags, measured per token only."""
    max_length: int = 256
    """Longest input in tokens; longer sentences are split between words, counted and reported."""
