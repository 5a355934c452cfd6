"""Options of the policy gradients with and without a critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upslope.errors import ConfigError
from upslope.options.common import RLOptions, check


@dataclass(frozen=True, kw_only=True)
class PPOOptions(RLOptions):
    """Proximal policy optimization with a critic (Schulman et al. 2017, arXiv 1707.06347), token by token."""

    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalized advantage estimation."""
    epsilon: float = 0.2
    """Clip range of the ratio, downwards and (unless epsilon_high is given) upwards."""
    epsilon_high: float | None = None
    """Clip range upwards."""
    dual_clip: float | None = None
    """Bound on the loss of bad actions whose ratio has grown (arXiv 1912.09729); left out: off."""
    num_epochs: int = 2
    """Passes over each batch of rollouts."""
    num_minibatches: int = 1
    """Optimizer steps per pass."""
    critic: str = "shared"
    """shared: a value head on the policy's trunk; separate: a copy of the model; or a reward model's folder."""
    critic_learning_rate: float | None = None
    """Of the critic's own parameters (the value head when shared); left out: ten times learning_rate."""
    vf_coef: float = 0.1
    """Weight of the value loss where it reaches the shared trunk."""
    value_clip: float | None = None
    """Clip range of the value around the rollout's value; left out: off."""
    value_pretraining_steps: int = 0
    """Steps that train only the critic before the policy moves."""
    kl_coef: float = 0.0
    """Weight of the KL divergence to the reference model; at 0 no reference is loaded."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """reward: subtracted per token before GAE (k1); loss: added to the loss with its exact gradient."""
    kl_target: float | None = None
    """Adapt kl_coef so that the KL per completion stays here (arXiv 1909.08593)."""
    kl_horizon: int = 10000
    """Samples over which kl_coef adapts."""
    rollout_kl_coef: float = 0.0
    """Weight of a KL penalty to the policy that sampled (PPO's penalty form)."""
    target_kl: float | None = None
    """End the passes over a batch when the KL to the sampling policy exceeds 1.5 times this."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    whiten_advantages: bool = True
    """Give the advantages of a step mean 0 and variance 1."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range."""
        RLOptions.validate(self)
        check(
            self,
            gamma=(0, 1),
            lam=(0, 1),
            epsilon=(0, None),
            epsilon_high=(0, None),
            dual_clip=(1, None),
            num_epochs=(1, None),
            num_minibatches=(1, None),
            critic_learning_rate=(0, None),
            vf_coef=(0, None),
            value_clip=(0, None),
            value_pretraining_steps=(0, None),
            kl_coef=(0, None),
            kl_target=(0, None),
            kl_horizon=(1, None),
            rollout_kl_coef=(0, None),
            target_kl=(0, None),
            entropy_coef=(0, None),
        )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ConfigError("kl_target adapts kl_coef: give kl_coef a start value above 0")


@dataclass(frozen=True, kw_only=True)
class GRPOOptions(RLOptions):
    """Policy gradient with the group as baseline: GRPO, Dr. GRPO, RLOO, REINFORCE++; DAPO, GSPO, CISPO."""

    num_prompts: int = 16
    """Prompts per step (P)."""
    num_generations: int = 8
    """Completions per prompt (G)."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce++"] = "grpo"
    """grpo: centred, divided by the group's deviation; dr_grpo: centred; rloo: leave-one-out; reinforce++: centred,
    then whitened over the batch."""
    loss: Literal["clipped", "gspo", "cispo"] = "clipped"
    """clipped: PPO's per token; gspo: per sequence; cispo: clipped weights, every token keeps its gradient."""
    normalizer: Literal["auto", "token", "sequence", "constant"] = "auto"
    """Divide by all trained tokens (DAPO), average each sequence first (GRPO paper), or by a constant (Dr. GRPO);
    auto: sequence with gspo, else token."""
    epsilon: float = 0.2
    """Clip range of the ratio downwards and (unless epsilon_high is given) upwards."""
    epsilon_high: float | None = None
    """Clip range upwards (DAPO: 0.28)."""
    num_iterations: int = 1
    """Passes over each batch of rollouts."""
    num_minibatches: int = 1
    """Optimizer steps per pass."""
    beta: float = 0.0
    """Weight of the KL divergence to the reference model in the loss; at 0 no reference is loaded."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    dynamic_sampling: bool = False
    """Replace prompts whose rewards are all equal by fresh ones until the batch is full (DAPO)."""
    dynamic_sampling_rounds: int = 8
    """Give up with an error after this many rounds."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range."""
        RLOptions.validate(self)
        check(
            self,
            num_generations=(2, None),
            epsilon=(0, None),
            epsilon_high=(0, None),
            num_iterations=(1, None),
            num_minibatches=(1, None),
            beta=(0, None),
            entropy_coef=(0, None),
            dynamic_sampling_rounds=(1, None),
        )
        if self.loss == "gspo" and self.normalizer not in ("auto", "sequence"):
            raise ConfigError(f"normalizer = {self.normalizer}: gspo has one loss per sequence; use auto or sequence")
        if self.truncated == "bootstrap":
            raise ConfigError("truncated = bootstrap needs a critic: use terminate or mask, or the ppo verb")
