"""The networks beside a policy: the critic, and the reference model that a policy is held to."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from upslope.build import Policy, load_critic, load_reference, take_masters
from upslope.errors import ConfigError
from upslope.functional.kl import AdaptiveKL, k1
from upslope.functional.metrics import explained_variance
from upslope.functional.returns import discounted_returns
from upslope.functional.supervised_losses import value_loss
from upslope.models.protocol import ScalarHead
from upslope.options import PPOOptions, ReinforceOptions, RunOptions
from upslope.training.checkpoint import Part
from upslope.training.experience import Experience
from upslope.training.optim import Group, MasterAdamW, decay_groups
from upslope.training.step import Forward, Outputs, score, update
from upslope.types import Batch


class Critic(Part):
    """What `choice` names, as `build.load_critic`; None: no critic.

    `head`: on the policy's trunk, and trained with it as the groups in `extra`; None where the critic stands apart
    with an optimizer of its own, or is none.
    """

    def __init__(self, options: PPOOptions | ReinforceOptions, policy: Policy, choice: str | None) -> None:
        self.options = options
        self.network = load_critic(policy, choice, options) if choice is not None else None
        self.head: ScalarHead | None = None
        self.extra: list[Group] = []
        self.optimizer: MasterAdamW | None = None
        if self.network is None:
            return
        named, factor = self.network.named_parameters(), _rate_factor(options)
        if self.network.model is None:
            self.head, self.extra = self.network.head, [Group(named, lr_factor=factor)]
            return
        groups = decay_groups(named.items(), weight_decay=options.weight_decay, lr_factor=factor)
        self.optimizer = MasterAdamW(groups, masters=take_masters(self.network))

    def score(self, batches: Sequence[Batch]) -> Outputs:
        """Values of a network of its own, without gradient; no part where there is none."""
        if self.network is None or self.network.model is None:
            return Outputs()
        return score(self.network.model, batches, Forward(logp=False, head=self.network.head))

    def update(self, x: Experience, members: Sequence[int], learning_rate: float) -> dict[str, float]:
        """One optimizer step of a network of its own on these sequences; nothing where there is none."""
        if self.network is None or self.network.model is None or self.optimizer is None:
            return {}
        o, model = self.options, self.network.model.train()
        batches, _ = x.batches(members, o.micro_batch_tokens, device=model.device)
        made = update(
            model,
            self.optimizer,
            batches,
            self.loss,
            Forward(logp=False, head=self.network.head),
            learning_rate=learning_rate,
            max_grad_norm=o.max_grad_norm,
        )
        return {"loss/value": made["loss/value"], "critic_grad_norm": made["grad_norm"]}

    def loss(self, batch: Batch, out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the squared error against the returns, with value_clip clipped around the rollout's value."""
        clip, f = getattr(self.options, "value_clip", None), batch.fields
        loss_N = value_loss(out.values_N, f["returns"], old_values=None if clip is None else f["values"], clip=clip)
        return loss_N, {"loss/value": loss_N}

    def explained(self, x: Experience, rewards_BT: Tensor) -> dict[str, float]:
        """How much of the returns' variance the critic explains."""
        gamma, mask_BT = self.options.gamma, x.mask_BT
        returns_BT = discounted_returns(rewards_BT, mask_BT, gamma=gamma, bootstrap_B=x.bootstrap_B)
        return {"val/explained_variance": float(explained_variance(x.padded(x.values), returns_BT, mask_BT))}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Its weights, and the moments of an optimizer of its own."""
        if self.network is None:
            return {}
        if self.optimizer is None:
            return {"critic": {name: p.detach() for name, p in self.network.named_parameters().items()}}
        return {"critic": self.optimizer.weights(), "critic_optimizer": self.optimizer.state()}

    def load(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; a head on the policy's trunk is loaded with the policy."""
        if self.optimizer is not None:
            self.optimizer.load(tensors["critic"], tensors["critic_optimizer"])


def _rate_factor(options: PPOOptions | ReinforceOptions) -> float:
    """The critic's learning rate as a multiple of the policy's."""
    if options.critic_learning_rate is None:
        return 10.0
    if options.learning_rate == 0:
        raise ConfigError("critic_learning_rate is relative to the schedule of learning_rate, which must not be 0")
    return options.critic_learning_rate / options.learning_rate


class Reference(Part):
    """The start model, as a frozen copy or as the policy without its adapters; with coef 0 it is not loaded.

    coef: the weight of the KL in this step; with a `target` it adapts from step to step (arXiv 1909.08593).
    """

    def __init__(
        self, options: RunOptions, policy: Policy, coef: float, target: float | None = None, horizon: int = 10000
    ) -> None:
        self.options, self.policy, self.coef = options, policy, coef
        self.model = load_reference(policy, options) if coef else None
        self.controller = AdaptiveKL(coef, target, horizon) if target else None

    def score(self, x: Experience, temperature: float) -> dict[str, float]:
        """Fill in ref_logprobs; the KL of the step per completion (k1), which also moves the next step's weight."""
        policy, budget = self.policy, self.options.micro_batch_tokens
        batches, order = x.batches(range(x.size), budget, device=policy.model.device)
        if self.model is not None:
            out = score(self.model, batches, Forward(temperature=temperature))
        else:
            with policy.as_reference() as model:
                out = score(model, batches, Forward(temperature=temperature))
        x.ref_logprobs = x.in_order(out, order).logp_N
        kl = float(x.sequence_sums(k1(x.old_logprobs, x.ref_logprobs)).mean())
        if self.controller:
            self.coef = self.controller.coef
            self.controller.update(kl, x.size)
        return {"objective/kl": kl}

    def state(self) -> dict[str, Any]:
        """The controller's."""
        return {"kl": self.controller.state_dict() if self.controller else None}

    def load(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        if self.controller and state.get("kl"):
            self.controller.load_state_dict(state["kl"])
