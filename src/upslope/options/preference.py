"""Options of what learns from preferences: the policy directly, or a reward model."""

from typing import Literal

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import BatchOptions, RowOptions, RunOptions

BETA = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.5}
"""The papers' usual values, without --beta."""
SIMPO_MARGIN = 1.375


class PreferenceData(RowOptions, BatchOptions, RunOptions):
    """Data."""

    FIRST = "data model learning_rate batch_size num_epochs max_steps max_length lora_rank output_dir"

    data: str | None = None
    """Rows (prompt, chosen, rejected), or sides that repeat the prompt: a .jsonl/.csv/.parquet file or a hub id."""

    def _check(self) -> None:
        if not self.data:
            raise ConfigError("data is not given: name a file of rows, as in --data pairs.jsonl")


class DPOOptions(PreferenceData):
    """Learning a policy from preferences without a reward model: DPO (arXiv 2305.18290), IPO, KTO, ORPO, SimPO."""

    FIRST = f"loss beta {PreferenceData.FIRST}"

    learning_rate: float = 1e-6
    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = "dpo"
    """dpo, ipo: pairs against a reference; kto: labelled answers against one; orpo, simpo: pairs without reference."""
    beta: float | None = option(None, 1e-6)
    """Strength of the pull to the reference (dpo, ipo, kto), weight of the odds ratio (orpo), scale of the mean
    log-prob (simpo); default: 0.1, simpo 2.5."""
    label_smoothing: float = option(0.0, needs="loss=dpo")
    """Probability that a pair is labelled the wrong way round (conservative DPO); loss = dpo only."""
    margin: float | None = option(None, 0, needs="loss=simpo")
    """SimPO's gamma, in units of beta times the log-prob; default: 1.375."""
    desirable_weight: float = option(1.0, 0, needs="loss=kto")
    """KTO: weight of good answers; keep weight times number of good over bad between 1 and 4/3."""
    undesirable_weight: float = option(1.0, 0, needs="loss=kto")
    """KTO: weight of bad answers."""
    sft_coef: float = option(0.0, 0, needs="loss=dpo,ipo,simpo")
    """Weight of the likelihood of the chosen answer, per token (arXiv 2404.19733); dpo, ipo and simpo."""

    def _check(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5")

    @property
    def strength(self) -> float:
        """beta, or what is usual for the loss."""
        return BETA[self.loss] if self.beta is None else self.beta


class RewardOptions(PreferenceData):
    """A reward model: a network with a scalar head that says how good an answer, or each step of it, is."""

    FIRST = f"kind {PreferenceData.FIRST}"

    kind: Literal["outcome", "process"] = "outcome"
    """outcome: Bradley-Terry on pairs, read at the end of the answer; process: one label per step, read at its end."""
    margin: float = option(0.0, 0, needs="kind=outcome")
    """Outcome: by how much the better answer should win; a column margin in the rows takes its place."""
    centering: float = option(0.0, 0, needs="kind=outcome")
    """Outcome: weight of (chosen + rejected)^2, which fixes the free constant (arXiv 2312.09244: 0.01)."""
    aggregate: Literal["min", "prod", "last", "mean"] = option("min", needs="kind=process")
    """Process: how the probabilities of the steps become one reward when the model judges."""
