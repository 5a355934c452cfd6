"""The critic: values of states, from a head on the policy's trunk or from a network of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from upslope.build import Policy, load_critic, take_masters
from upslope.errors import ConfigError
from upslope.functional.metrics import explained_variance
from upslope.functional.returns import discounted_returns
from upslope.models.protocol import ScalarHead
from upslope.options import PPOOptions, ReinforceOptions
from upslope.training.experience import Experience
from upslope.training.optim import Group, MasterAdamW, decay_groups
from upslope.training.step import Forward, Loss, Outputs, score, update
from upslope.types import Batch


class Critic:
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

    def update(self, x: Experience, members: Sequence[int], loss: Loss, learning_rate: float) -> dict[str, float]:
        """One optimizer step of a network of its own on these sequences; nothing where there is none."""
        if self.network is None or self.network.model is None or self.optimizer is None:
            return {}
        o, model = self.options, self.network.model.train()
        batches, _ = x.batches(members, o.micro_batch_tokens, device=model.device)
        made = update(
            model,
            self.optimizer,
            batches,
            loss,
            Forward(logp=False, head=self.network.head),
            learning_rate=learning_rate,
            max_grad_norm=o.max_grad_norm,
        )
        return {"loss/value": made["loss/value"], "critic_grad_norm": made["grad_norm"]}

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

    def state(self) -> dict[str, Any]:
        """Nothing besides the tensors."""
        return {}

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
