"""Options of what learns from preferences: the policy directly, or a reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upslope.errors import ConfigError
from upslope.options.common import RunOptions, check, column_names

BETA = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.5}
"""The papers' usual values, where --beta is left out."""
SIMPO_MARGIN = 1.375


@dataclass(frozen=True, kw_only=True)
class PreferenceData(RunOptions):
    """What both verbs read, and how much of it at a time."""

    data: str | None = None
    """Rows (prompt, chosen, rejected), or sides that repeat the prompt: a .jsonl/.csv/.parquet file or a hub id."""
    eval_data: str | None = None
    """Held-out rows in the same form; left out: the last tenth of the data."""
    columns: tuple[str, ...] = ()
    """What the rows' own columns are, as in prompt=question completion=answer; left out: those names themselves."""
    batch_size: int = 16
    """Rows (pairs) per optimizer step."""
    num_epochs: float | None = None
    """Passes over the data; when given it sets max_steps."""
    max_length: int = 1024
    """Longest sequence in tokens; a row with a longer one, or beyond the context, is dropped and counted."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range."""
        RunOptions.validate(self)
        check(self, batch_size=(1, None), max_length=(2, None), num_epochs=(0, None))
        column_names(self.columns)
        if not self.data:
            raise ConfigError("data is not given: name a file of rows, as in --data pairs.jsonl")


@dataclass(frozen=True, kw_only=True)
class DPOOptions(PreferenceData):
    """Learning a policy from preferences without a reward model: DPO (arXiv 2305.18290), IPO, KTO, ORPO, SimPO."""

    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = "dpo"
    """dpo, ipo: pairs against a reference; kto: labelled answers against one; orpo, simpo: pairs without reference."""
    beta: float | None = None
    """Strength of the pull to the reference (dpo, ipo, kto), weight of the odds ratio (orpo), scale of the mean
    log-prob (simpo); left out: 0.1, simpo 2.5."""
    label_smoothing: float = 0.0
    """Probability that a pair is labelled the wrong way round (conservative DPO); loss = dpo only."""
    margin: float | None = None
    """SimPO's gamma, in units of beta times the log-prob; left out: 1.375."""
    desirable_weight: float = 1.0
    """KTO: weight of good answers; keep weight times number of good over bad between 1 and 4/3."""
    undesirable_weight: float = 1.0
    """KTO: weight of bad answers."""
    sft_coef: float = 0.0
    """Weight of the likelihood of the chosen answer, per token (arXiv 2404.19733); dpo, ipo and simpo."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range or an option that the loss does not have."""
        PreferenceData.validate(self)
        check(
            self,
            beta=(1e-6, None),
            margin=(0, None),
            desirable_weight=(0, None),
            undesirable_weight=(0, None),
            sft_coef=(0, None),
        )
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5")
        owners = {
            "label_smoothing": ("dpo",),
            "margin": ("simpo",),
            "desirable_weight": ("kto",),
            "undesirable_weight": ("kto",),
            "sft_coef": ("dpo", "ipo", "simpo"),
        }
        for name, losses in owners.items():
            if self.loss not in losses and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ConfigError(f"{name} belongs to loss = {' or '.join(losses)}, not {self.loss}: leave it out")

    @property
    def strength(self) -> float:
        """beta, or what is usual for the loss."""
        return BETA[self.loss] if self.beta is None else self.beta


@dataclass(frozen=True, kw_only=True)
class RewardOptions(PreferenceData):
    """A reward model: a network with a scalar head that says how good an answer, or each step of it, is."""

    kind: Literal["outcome", "process"] = "outcome"
    """outcome: Bradley-Terry on pairs, read at the end of the answer; process: one label per step, read at its end."""
    margin: float = 0.0
    """Outcome: by how much the better answer should win; a column margin in the rows takes its place."""
    centering: float = 0.0
    """Outcome: weight of (chosen + rejected)^2, which fixes the free constant (arXiv 2312.09244: 0.01)."""
    aggregate: Literal["min", "prod", "last", "mean"] = "min"
    """Process: how the probabilities of the steps become one reward when the model judges."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range or an option of the other kind."""
        PreferenceData.validate(self)
        check(self, margin=(0, None), centering=(0, None))
        if self.kind == "process" and (self.margin or self.centering):
            raise ConfigError("margin and centering compare two answers (kind = outcome): leave them out with process")
        if self.kind == "outcome" and self.aggregate != "min":
            raise ConfigError(
                "aggregate is about the steps of a process reward model: leave it out with kind = outcome"
            )
