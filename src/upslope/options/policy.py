"""Options of the policy gradients: REINFORCE, PPO with a critic, and the group as baseline."""

from typing import Literal

from upslope.config import option
from upslope.errors import ConfigError
from upslope.options.common import Named, RLOptions
from upslope.plugins import check_name

_OBJECTIVE = "upslope.loop.objective:"
LOSSES = {name: f"{_OBJECTIVE}{name}" for name in ("clipped", "gspo", "cispo", "sapo")}
"""Where each loss of grpo is. A new one is a function there and its name here."""
PPO_LOSSES = {"clipped": LOSSES["clipped"]}
"""Those of ppo."""
CRITIC_ADVANTAGES = {name: f"{_OBJECTIVE}{name}" for name in ("gae", "vtrace", "n_step")}
"""Where each advantage of ppo is, made with a critic."""
GROUP_ADVANTAGES = {name: f"{_OBJECTIVE}{name}" for name in ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus")}
GROUP_ADVANTAGES["reinforce++"] = GROUP_ADVANTAGES.pop("reinforce_plus_plus")
"""Where each advantage of grpo is, made within a group."""


class PolicyOptions(RLOptions):
    """Update."""

    entropy_coef: float = option(0.0, 0)
    """Weight of an entropy bonus."""


class ClipOptions(PolicyOptions):
    """Update."""

    epsilon: float = option(0.2, 0)
    """Clip range of the ratio, downwards and (unless epsilon_high is given) upwards."""
    epsilon_high: float | None = option(None, 0)
    """Clip range upwards (DAPO: 0.28)."""
    num_minibatches: int = option(1, 1)
    """Optimizer steps per pass."""


class CriticOptions(PolicyOptions):
    """Returns and critic."""

    gamma: float = option(1.0, 0, 1)
    """Discount per token."""
    lam: float = option(1.0, 0, 1)
    """Lambda of generalized advantage estimation, in ppo of V-trace's value targets, too; 1 is the Monte Carlo return
    minus V."""
    critic: str = "shared"
    """shared: a value head on the policy's trunk; separate: a copy of the model; or a reward model's folder."""
    critic_learning_rate: float | None = option(None, 0)
    """Of the critic's own parameters (the value head when shared); default: ten times learning_rate."""
    vf_coef: float = option(0.1, 0)
    """Weight of the value loss where it reaches the shared trunk."""


class KLOptions(PolicyOptions):
    """KL to the reference model."""

    FIRST = f"{RLOptions.FIRST} kl_coef"

    kl_coef: float = option(0.0, 0)
    """Weight of the KL divergence to the reference model, in the reward (k1) unless ppo's kl_placement is loss; at 0 no
    reference is loaded."""
    kl_target: float | None = option(None, 1e-12, needs="kl_coef")
    """Adapt kl_coef so that the KL per completion stays here (arXiv 1909.08593)."""
    kl_horizon: int = option(10000, 1)
    """Samples over which kl_coef adapts."""

    def _check(self) -> None:
        samples = self.num_prompts * self.num_generations
        # The coefficient moves by up to 0.2 samples / horizon a step.
        if self.kl_target is not None and samples >= 5 * self.kl_horizon:
            raise ConfigError(
                f"kl_horizon = {self.kl_horizon} is too short for {samples} completions a step: kl_coef would not stay "
                f"positive; give at least {samples // 5 + 1}"
            )


class ReinforceOptions(CriticOptions, KLOptions):
    """REINFORCE (Williams 1992): one gradient step per batch, return to go minus a baseline, no ratio and no clip."""

    baseline: Literal["none", "moving", "learned", "greedy", "reinforce++"] = "moving"
    """none; moving: mean of past rewards; learned: a value head (actor-critic); greedy: the reward of the greedy reply
    (SCST, ReMax); reinforce++: no baseline, advantages whitened over the batch's tokens."""
    baseline_decay: float = option(0.9, 0, 0.999999, needs="baseline=moving")
    """How much of the moving mean is kept at each step."""
    lam: float = option(1.0, needs="baseline=learned")
    normalizer: Literal["token", "constant"] = "token"
    """Divide by all trained tokens, or by completions times max_completion_length: the unbiased gradient, scaled."""
    critic: str = option("shared", needs="baseline=learned")
    critic_learning_rate: float | None = option(None, needs="baseline=learned")
    vf_coef: float = option(0.1, needs="baseline=learned")
    whiten_advantages: bool | None = None
    """Give the advantages of a step mean 0 and variance 1 over its tokens; default: only with reinforce++."""

    def _check(self) -> None:
        if self.truncated == "bootstrap" and self.baseline != "learned":
            raise ConfigError("truncated = bootstrap needs a critic: use baseline = learned, or terminate or mask")
        if self.baseline == "reinforce++" and self.whiten_advantages is False:
            raise ConfigError("reinforce++ is whitening: without it use baseline = none")


class PPOOptions(ClipOptions, CriticOptions, KLOptions):
    """Proximal policy optimization with a critic (Schulman et al. 2017, arXiv 1707.06347), token by token."""

    lam: float = 0.95
    advantage: Named = "gae"
    """gae; n_step: the rewards of n tokens, then the value; vtrace: corrects for rollouts of older weights inside the
    estimator (arXiv 1802.01561); or your own, my_advantages.py:fn (docs/learners.md)."""
    n_step: int = option(5, 1, 1_000_000, needs="advantage=n_step")
    """Tokens whose rewards an n_step advantage adds up before it takes the critic's word."""
    loss: Named = "clipped"
    """clipped: the surrogate of PPO; or your own, my_losses.py:fn (docs/learners.md)."""
    rho_clip: float = option(1.0, 1e-6, needs="advantage=vtrace")
    """V-trace: largest importance weight of a temporal difference and of the policy gradient."""
    c_clip: float = option(1.0, 1e-6, needs="advantage=vtrace")
    """V-trace: largest importance weight in the trace."""
    dual_clip: float | None = option(None, 1.00001)
    """Bound on the loss of bad actions whose ratio has grown (arXiv 1912.09729); default: off."""
    num_epochs: int = option(2, 1)
    """Passes over each batch of rollouts."""
    value_clip: float | None = option(None, 1e-6)
    """Clip range of the value around the rollout's value; default: off."""
    value_pretraining_steps: int = option(0, 0)
    """Steps that train only the critic before the policy moves."""
    kl_placement: Literal["reward", "loss"] = option("reward", needs="kl_coef")
    """reward: subtracted per token before GAE (k1); loss: added to the loss with its exact gradient."""
    rollout_kl_coef: float = option(0.0, 0)
    """Weight of a KL penalty to the policy before the step's first update (PPO's penalty form)."""
    target_kl: float | None = option(None, 1e-12)
    """End the passes over a batch when the KL to the policy before them exceeds 1.5 times this in a minibatch."""
    whiten_advantages: bool = True
    """Give the advantages of a step mean 0 and variance 1."""

    def _check(self) -> None:
        check_name(self.advantage, CRITIC_ADVANTAGES, kind="advantage")
        check_name(self.loss, PPO_LOSSES, kind="loss")
        if self.advantage == "vtrace":
            if self.filtered:
                raise ConfigError("advantage = vtrace samples from the whole policy: switch top_k, top_p and min_p off")
            if self.rollout_correction not in ("auto", "none"):
                raise ConfigError(
                    f"advantage = vtrace has its own importance weights (rho_clip): rollout_correction = "
                    f"{self.rollout_correction} would apply them twice; leave it at auto"
                )


class GRPOOptions(ClipOptions):
    """Policy gradient with the group as baseline: GRPO, Dr. GRPO, RLOO, REINFORCE++; DAPO, GSPO, CISPO, SAPO."""

    FIRST = f"{RLOptions.FIRST} beta"

    num_prompts: int = 16
    num_generations: int = option(8, 2)
    advantage: Named = "grpo"
    """grpo: centred, divided by the group's deviation; dr_grpo: centred; rloo: leave-one-out; reinforce++: centred,
    then whitened over the batch; or your own, my_advantages.py:fn (docs/learners.md)."""
    loss: Named = "clipped"
    """clipped: PPO's per token; gspo: per sequence; cispo: clipped weights, every token keeps its gradient; sapo: a
    smooth gate instead of a clip; or your own, my_losses.py:fn (docs/learners.md)."""
    normalizer: Literal["auto", "token", "sequence", "constant"] = "auto"
    """Divide by all trained tokens (DAPO), average each sequence first (GRPO paper), or by a constant (Dr. GRPO);
    auto: sequence with gspo and sapo, else token."""
    tau_positive: float = option(1.0, 1e-6, needs="loss=sapo")
    """SAPO: how fast the gate closes for good completions."""
    tau_negative: float = option(1.05, 1e-6, needs="loss=sapo")
    """SAPO: how fast the gate closes for bad completions."""
    num_iterations: int = option(1, 1, also="num_epochs")
    """Passes over each batch of rollouts."""
    beta: float = option(0.0, 0, also="kl_coef")
    """Weight of the KL divergence to the reference model in the loss; at 0 no reference is loaded."""
    dynamic_sampling: bool = False
    """Replace prompts whose completions all have one reward, penalties included, until the batch is full (DAPO)."""
    dynamic_sampling_rounds: int = option(8, 1, needs="dynamic_sampling")
    """Give up with an error after this many rounds."""

    def _check(self) -> None:
        check_name(self.advantage, GROUP_ADVANTAGES, kind="advantage")
        check_name(self.loss, LOSSES, kind="loss")
        if self.loss == "gspo" and self.normalizer not in ("auto", "sequence"):
            raise ConfigError(f"normalizer = {self.normalizer}: gspo has one loss per sequence; use auto or sequence")
        if self.truncated == "bootstrap":
            raise ConfigError("truncated = bootstrap needs a critic: use terminate or mask, or the ppo verb")
