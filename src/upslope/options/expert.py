"""Options of expert iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import ColumnOptions, RLOptions


@dataclass(frozen=True, kw_only=True)
class ExpertOptions(RLOptions, ColumnOptions):
    """Expert iteration: sample, keep the good samples, imitate them, again (RAFT, ReST-EM, RFT)."""

    FIRST = f"{RLOptions.FIRST} train_steps keep"

    num_rounds: int | None = option(None, 1)
    """Rounds of sampling and imitation; when given it sets max_steps to num_rounds times train_steps."""
    train_steps: int = option(20, 1)
    """Optimizer steps per round; a new round begins after them."""
    max_steps: int = 60
    """Stop after this many optimizer steps, of all rounds together."""
    num_prompts: int = 64
    """Prompts per round (P)."""
    num_generations: int = 8
    """Samples per prompt (K)."""
    batch_size: int = option(16, 1)
    """Training sequences per optimizer step."""
    keep: Literal["threshold", "best", "top"] = "threshold"
    """threshold: samples that are good enough; best: the best sample of each prompt; top: the best of the round."""
    threshold: float | None = option(None, -math.inf)
    """Least reward of a kept sample; default with keep = threshold: the samples the task calls correct."""
    keep_share: float = option(0.25, 1e-6, 1)
    """With keep = top: the share of the round's samples that is kept."""
    max_per_prompt: int = option(10, 1)
    """At most this many kept samples of one prompt, the best first."""
    dedupe: bool = True
    """Count equal replies to a prompt once, white space aside."""
    restart: bool = False
    """Train every round from the start model (ReST-EM), learning rate schedule included, not from the last round."""
    normalizer: Literal["token", "sample"] = "token"
    """token: mean over trained tokens; sample: sum over tokens, mean over all samples (REINFORCE's gradient)."""
    from_run: str | None = None
    """Folder of a finished run whose rollouts stand in for the first round's sampling."""
    mix_data: str | None = None
    """Rows to train on besides the samples: a .jsonl/.csv/.parquet/.txt file or a hub id."""
    columns: tuple[str, ...] = ()
    """What the columns of mix_data are, as in prompt=question completion=answer; default: those names themselves."""
    mix_ratio: float = option(0.0, 0, 0.99)
    """Share of each batch taken from mix_data."""
    max_length: int = option(1024, 2)
    """Longest row of mix_data in tokens; longer rows, and those beyond the context, are dropped and counted."""
    truncated: Literal["terminate", "bootstrap", "mask"] = "mask"
    """A completion cut by its budget: may be kept like any other (terminate), or never is (mask)."""

    @property
    def on_policy(self) -> bool:
        """No: what is kept is imitated, whoever drew it; so filtered sampling needs no importance weights."""
        return False

    def validate(self) -> None:
        """Raise ConfigError for a value out of range, or for options that imitation has no use for."""
        super().validate()
        if (self.mix_data is None) != (self.mix_ratio == 0):
            raise ConfigError("mix_data and mix_ratio go together: name the rows and their share of a batch")
        if self.columns and self.mix_data is None:
            raise ConfigError("columns is about the rows of mix_data, which are not given")
        if self.truncated == "bootstrap":
            raise ConfigError("truncated = bootstrap needs a critic: use terminate or mask")
        if self.rollout_lag:
            raise ConfigError("rollout_lag: expert samples once per round and has no other lag; leave it at 0")
        if self.changed("rollout_correction") or self.changed("rollout_correction_cap"):
            raise ConfigError("expert imitates what it keeps: rollout_correction has no place in it, leave it out")
