"""Options of the policy gradients: REINFORCE, PPO with a critic, and the group as baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upslope.errors import ConfigError
from upslope.options.common import RLOptions, check


@dataclass(frozen=True, kw_only=True)
class ReinforceOptions(RLOptions):
    """REINFORCE (Williams 1992): one gradient step per batch, return to go minus a baseline, no ratio and no clip."""

    baseline: Literal["none", "moving", "learned", "greedy", "reinforce++"] = "moving"
    """none; moving: mean of past rewards; learned: a value head (actor-critic); greedy: the reward of the greedy reply
    (SCST, ReMax); reinforce++: no baseline, advantages whitened over the batch's tokens."""
    baseline_decay: float = 0.9
    """How much of the moving mean is kept at each step."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 1.0
    """Lambda of generalized advantage estimation with the learned baseline; 1 is the Monte Carlo return minus V."""
    normalizer: Literal["token", "constant"] = "token"
    """Divide by all trained tokens, or by completions times max_completion_length: the unbiased gradient, scaled."""
    whiten_advantages: bool | None = None
    """Give the advantages of a step mean 0 and variance 1 over its tokens; left out: only with reinforce++."""
    critic: str = "shared"
    """shared: a value head on the policy's trunk; separate: a copy of the model; or a reward model's folder."""
    critic_learning_rate: float | None = None
    """Of the critic's own parameters (the value head when shared); left out: ten times learning_rate."""
    vf_coef: float = 0.1
    """Weight of the value loss where it reaches the shared trunk."""
    kl_coef: float = 0.0
    """Weight of the KL divergence to the reference model, in the reward (k1); at 0 no reference is loaded."""
    kl_target: float | None = None
    """Adapt kl_coef so that the KL per completion stays here (arXiv 1909.08593)."""
    kl_horizon: int = 10000
    """Samples over which kl_coef adapts."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""

    def validate(self) -> None:
        """Raise ConfigError for a value out of range, or one that this baseline does not use."""
        RLOptions.validate(self)
        check(
            self,
            baseline_decay=(0, 0.999999),
            gamma=(0, 1),
            lam=(0, 1),
            critic_learning_rate=(0, None),
            vf_coef=(0, None),
            kl_coef=(0, None),
            kl_target=(0, None),
            kl_horizon=(1, None),
            entropy_coef=(0, None),
        )
        _check_kl_target(self)
        for name, needed in _NEEDED_BASELINE.items():
            changed = getattr(self, name) != type(self).__dataclass_fields__[name].default
            if changed and self.baseline != needed:
                raise ConfigError(f"{name} belongs to baseline = {needed}; baseline is {self.baseline}")
        if self.truncated == "bootstrap" and self.baseline != "learned":
            raise ConfigError("truncated = bootstrap needs a critic: use baseline = learned, or terminate or mask")
        if self.baseline == "reinforce++" and self.whiten_advantages is False:
            raise ConfigError("reinforce++ is whitening: without it use baseline = none")


_NEEDED_BASELINE = {
    "baseline_decay": "moving",
    "lam": "learned",
    "critic": "learned",
    "critic_learning_rate": "learned",
    "vf_coef": "learned",
}


@dataclass(frozen=True, kw_only=True)
class PPOOptions(RLOptions):
    """Proximal policy optimization with a critic (Schulman et al. 2017, arXiv 1707.06347), token by token."""

    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalized advantage estimation; of V-trace's value targets."""
    advantage: Literal["gae", "vtrace"] = "gae"
    """gae; vtrace: corrects for rollouts of older weights inside the estimator (arXiv 1802.01561)."""
    rho_clip: float = 1.0
    """V-trace: largest importance weight of a temporal difference and of the policy gradient."""
    c_clip: float = 1.0
    """V-trace: largest importance weight in the trace."""
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
        if self.advantage == "vtrace":
            if self.filtered:
                raise ConfigError("advantage = vtrace samples from the whole policy: switch top_k, top_p and min_p off")
            if self.rollout_correction not in ("auto", "none"):
                raise ConfigError(
                    f"advantage = vtrace has its own importance weights (rho_clip): rollout_correction = "
                    f"{self.rollout_correction} would apply them twice; leave it at auto"
                )
        elif self.rho_clip != 1.0 or self.c_clip != 1.0:
            raise ConfigError("rho_clip and c_clip belong to advantage = vtrace; advantage is gae")
        RLOptions.validate(self)
        check(
            self,
            gamma=(0, 1),
            lam=(0, 1),
            rho_clip=(1e-6, None),
            c_clip=(1e-6, None),
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
        _check_kl_target(self)


@dataclass(frozen=True, kw_only=True)
class GRPOOptions(RLOptions):
    """Policy gradient with the group as baseline: GRPO, Dr. GRPO, RLOO, REINFORCE++; DAPO, GSPO, CISPO, SAPO."""

    num_prompts: int = 16
    """Prompts per step (P)."""
    num_generations: int = 8
    """Completions per prompt (G)."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce++"] = "grpo"
    """grpo: centred, divided by the group's deviation; dr_grpo: centred; rloo: leave-one-out; reinforce++: centred,
    then whitened over the batch."""
    loss: Literal["clipped", "gspo", "cispo", "sapo"] = "clipped"
    """clipped: PPO's per token; gspo: per sequence; cispo: clipped weights, every token keeps its gradient; sapo: a
    smooth gate instead of a clip."""
    normalizer: Literal["auto", "token", "sequence", "constant"] = "auto"
    """Divide by all trained tokens (DAPO), average each sequence first (GRPO paper), or by a constant (Dr. GRPO);
    auto: sequence with gspo and sapo, else token."""
    epsilon: float = 0.2
    """Clip range of the ratio downwards and (unless epsilon_high is given) upwards."""
    epsilon_high: float | None = None
    """Clip range upwards (DAPO: 0.28)."""
    tau_positive: float = 1.0
    """SAPO: how fast the gate closes for good completions."""
    tau_negative: float = 1.05
    """SAPO: how fast the gate closes for bad completions."""
    num_iterations: int = 1
    """Passes over each batch of rollouts."""
    num_minibatches: int = 1
    """Optimizer steps per pass."""
    beta: float = 0.0
    """Weight of the KL divergence to the reference model in the loss; at 0 no reference is loaded."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    dynamic_sampling: bool = False
    """Replace prompts whose completions all have one reward, penalties included, until the batch is full (DAPO)."""
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
            tau_positive=(1e-6, None),
            tau_negative=(1e-6, None),
            num_iterations=(1, None),
            num_minibatches=(1, None),
            beta=(0, None),
            entropy_coef=(0, None),
            dynamic_sampling_rounds=(1, None),
        )
        if self.loss == "gspo" and self.normalizer not in ("auto", "sequence"):
            raise ConfigError(f"normalizer = {self.normalizer}: gspo has one loss per sequence; use auto or sequence")
        if self.loss != "sapo" and (self.tau_positive, self.tau_negative) != (1.0, 1.05):
            raise ConfigError(f"tau_positive and tau_negative belong to loss = sapo; loss is {self.loss}")
        if self.truncated == "bootstrap":
            raise ConfigError("truncated = bootstrap needs a critic: use terminate or mask, or the ppo verb")


def _check_kl_target(options: ReinforceOptions | PPOOptions) -> None:
    if options.kl_target is None:
        return
    if options.kl_coef == 0:
        raise ConfigError("kl_target adapts kl_coef: give kl_coef a start value above 0")
    samples = options.num_prompts * options.num_generations
    if samples >= 5 * options.kl_horizon:  # the coefficient moves by up to 0.2 samples / horizon a step
        raise ConfigError(
            f"kl_horizon = {options.kl_horizon} is too short for {samples} completions a step: kl_coef would not stay "
            f"positive; give at least {samples // 5 + 1}"
        )
