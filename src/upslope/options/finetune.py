"""Options of what learns from rows, a teacher, the best of its own samples, or preferences."""

import math
from typing import Literal

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import (
    BatchOptions,
    ColumnOptions,
    Named,
    RLOptions,
    RowOptions,
    RowOrTaskOptions,
    RunOptions,
    SampledOptions,
)


class SFTOptions(RowOrTaskOptions, BatchOptions, RunOptions):
    """Supervised fine-tuning: maximum likelihood of completions, token-masked and packed."""

    FIRST = "data task model learning_rate batch_size num_epochs max_steps max_length lora_rank output_dir"

    num_examples: int = option(1000, 1, also="num_train_prompts")
    """How many demonstrations to take from --task."""
    loss: Literal["nll", "dft"] = "nll"
    """nll: negative log-likelihood; dft: each token's weighted by its own probability (arXiv 2508.05629)."""
    label_smoothing: float = option(0.0, 0, 1, needs="loss=nll")
    """Share of every target spread evenly over the vocabulary (arXiv 1512.00567); 0 is off."""
    max_completion_length: int = option(32, 1)
    """Longest reply in tokens when --task accuracy is measured."""


class DistillOptions(RowOrTaskOptions, SampledOptions):
    """On-policy distillation: the student writes, the teacher grades every token's distribution (GKD, MiniLLM)."""

    FIRST = (
        "teacher task data model divergence learning_rate num_prompts max_completion_length max_steps lora_rank "
        "output_dir"
    )

    teacher: str | None = None
    """The model to learn from, with the student's vocabulary: a folder, a hub id, a .gguf file or an alias."""
    task: Named | None = None
    """Prompts (and demonstrations) of a task, which also measures accuracy. Give this or --data."""
    data: str | None = None
    """Rows with prompts, or prompts and completions: a .jsonl/.csv/.parquet/.txt file or a hub id."""
    eval_data: str | None = option(None, needs="data")
    divergence: Literal["forward", "reverse", "jsd"] = "reverse"
    """Per token: forward KL(teacher || student), reverse KL(student || teacher), or their generalised JSD."""
    jsd_weight: float = option(0.5, needs="divergence=jsd")
    """The teacher's share in the mixture of jsd; near 0 it is forward KL, near 1 reverse KL."""
    on_policy_fraction: float = option(1.0, 0, 1)
    """Share of each step's prompts that the student answers (GKD's lambda); the others take the data's completions."""
    temperature: float = 1.0
    """Of the student's sampling, and of both distributions in the divergence."""
    num_generations: int = 1

    def _check(self) -> None:
        if self.on_policy_fraction:
            self.refuse_dropout("set on_policy_fraction to 0, which learns from the data alone, or leave it out")
        if self.teacher is None:
            raise ConfigError("name the teacher: --teacher FOLDER, a model with the student's vocabulary")
        if not 0 < self.jsd_weight < 1:
            raise ConfigError(f"jsd_weight is {self.jsd_weight}; it must lie between 0 and 1, both excluded")


class ExpertOptions(RLOptions, ColumnOptions):
    """Expert iteration: sample, keep the good samples, imitate them, again (RAFT, ReST-EM, RFT)."""

    FIRST = f"{RLOptions.FIRST} train_steps keep"
    on_policy = False
    """What is kept is imitated, whoever drew it; so filtered sampling needs no importance weights."""

    num_rounds: int | None = option(None, 1)
    """Rounds of sampling and imitation; when given it sets max_steps to num_rounds times train_steps."""
    train_steps: int = option(20, 1)
    """Optimizer steps per round; a new round begins after them."""
    max_steps: int = 60
    """Stop after this many optimizer steps, of all rounds together."""
    num_prompts: int = 64
    """Prompts per round (P)."""
    num_generations: int = 8
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
    columns: tuple[str, ...] = option((), needs="mix_data")
    mix_ratio: float = option(0.0, 0, 0.99)
    """Share of each batch taken from mix_data."""
    max_length: int = option(1024, 2)
    """Longest row of mix_data in tokens; longer rows, and those beyond the context, are dropped and counted."""
    truncated: Literal["terminate", "bootstrap", "mask"] = "mask"
    """A completion cut by its budget: may be kept like any other (terminate), or never is (mask)."""

    def _check(self) -> None:
        if (self.mix_data is None) != (self.mix_ratio == 0):
            raise ConfigError("mix_data and mix_ratio go together: name the rows and their share of a batch")
        if self.truncated == "bootstrap":
            raise ConfigError("truncated = bootstrap needs a critic: use terminate or mask")
        if self.rollout_lag:
            raise ConfigError("rollout_lag: expert samples once per round and has no other lag; leave it at 0")
        if self.changed("rollout_correction") or self.changed("rollout_correction_cap"):
            raise ConfigError("expert imitates what it keeps: rollout_correction has no place in it, leave it out")


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
