"""Options of expert iteration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from upslope.errors import ConfigError
from upslope.options.common import RLOptions, check, column_names


@dataclass(frozen=True, kw_only=True)
class ExpertOptions(RLOptions):
    """Expert iteration: sample, keep the good samples, imitate them, again (RAFT, ReST-EM, RFT)."""

    num_rounds: int | None = None
    """Rounds of sampling and imitation; when given it sets max_steps to num_rounds times train_steps."""
    train_steps: int = 20
    """Optimizer steps per round; a new round begins after them."""
    max_steps: int = 60
    """Stop after this many optimizer steps, of all rounds together."""
    num_prompts: int = 64
    """Prompts per round (P)."""
    num_generations: int = 8
    """Samples per prompt (K)."""
    batch_size: int = 16
    """Training sequences per optimizer step."""
    keep: Literal["threshold", "best", "top"] = "threshold"
    """threshold: samples that are good enough; best: the best sample of each prompt; top: the best of the round."""
    threshold: float | None = None
    """Least reward of a kept sample; left out with keep = threshold: the samples the task calls correct."""
    keep_share: float = 0.25
    """With keep = top: the share of the round's samples that is kept."""
    max_per_prompt: int = 10
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
    """What the columns of mix_data are, as in prompt=question completion=answer; left out: those names themselves."""
    mix_ratio: float = 0.0
    """Share of each batch taken from mix_data."""
    max_length: int = 1024
    """Longest row of mix_data in tokens; longer rows, and those beyond the context, are dropped and counted."""
    truncated: Literal["terminate", "bootstrap", "mask"] = "mask"
    """A completion cut by its budget: may be kept like any other (terminate), or never is (mask)."""

    @property
    def on_policy(self) -> bool:
        """No: what is kept is imitated, whoever drew it."""
        return False

    def validate(self) -> None:
        """Raise ConfigError for a value out of range, or for options that imitation has no use for."""
        # Filtered sampling needs no importance weights here: what is kept is imitated, whoever drew it.
        RLOptions.validate(replace(self, top_k=0, top_p=1.0, min_p=0.0))
        check(
            self,
            num_rounds=(1, None),
            train_steps=(1, None),
            batch_size=(1, None),
            keep_share=(1e-6, 1),
            max_per_prompt=(1, None),
            mix_ratio=(0, 0.99),
            max_length=(2, None),
            top_k=(0, None),
            top_p=(1e-6, 1),
            min_p=(0, 1),
        )
        if self.threshold is not None:
            check(self, threshold=(None, None))
        if (self.mix_data is None) != (self.mix_ratio == 0):
            raise ConfigError("mix_data and mix_ratio go together: name the rows and their share of a batch")
        if column_names(self.columns) and self.mix_data is None:
            raise ConfigError("columns is about the rows of mix_data, which are not given")
        if self.truncated == "bootstrap":
            raise ConfigError("truncated = bootstrap needs a critic: use terminate or mask")
        if self.rollout_lag:
            raise ConfigError("rollout_lag: expert samples once per round and has no other lag; leave it at 0")
        if self.rollout_correction != "auto" or self.rollout_correction_cap != 2.0:
            raise ConfigError("expert imitates what it keeps: rollout_correction has no place in it, leave it out")
