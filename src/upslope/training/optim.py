"""AdamW on float32 master weights, with the network computing in its own dtype.

A processor that multiplies bfloat16 faster than float32 should compute in bfloat16; an update of 1e-6 of a weight is
lost in it. So the optimizer owns float32 masters; the network holds copies in the compute dtype, renewed once per
update; gradients of every micro-batch are added up in float32.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upslope.devices.hardware import keep_freed_memory
from upslope.errors import RunError
from upslope.kernels.rows import accumulate_


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters with one learning rate factor (times the step's rate) and one weight decay."""

    parameters: Mapping[str, nn.Parameter]
    lr_factor: float = 1.0
    weight_decay: float = 0.0


def decay_groups(
    named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, lr_factor: float = 1.0
) -> list[Group]:
    """Matrices decay, vectors (norms, biases) do not; frozen parameters are left out."""
    trainable = {name: p for name, p in named if p.requires_grad}
    matrices = {name: p for name, p in trainable.items() if p.dim() > 1}
    vectors = {name: p for name, p in trainable.items() if p.dim() <= 1}
    groups = [Group(matrices, lr_factor, weight_decay), Group(vectors, lr_factor, 0.0)]
    return [group for group in groups if group.parameters]


class MasterAdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over float32 masters of the given parameters.

    `masters` gives float32 start values by name where the parameter itself was already rounded; a parameter without
    one starts from its own value. Parameters that compute in float32 or float64 are their own masters.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        *,
        masters: Mapping[str, Tensor] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        keep_freed_memory()
        self.updates = 0  # how often the weights have moved
        groups = list(groups)
        self.parameters: dict[str, nn.Parameter] = {}
        for group in groups:
            clash = self.parameters.keys() & group.parameters.keys()
            if clash:
                raise ValueError(f"two parameters are called {sorted(clash)[0]}")
            self.parameters.update(group.parameters)
        self.masters: dict[str, nn.Parameter] = {}
        self._hooks = []
        for name, parameter in self.parameters.items():
            if parameter.dtype in (torch.float32, torch.float64):
                self.masters[name] = parameter
                continue
            start = (masters or {}).get(name)
            self.masters[name] = nn.Parameter(parameter.detach().float() if start is None else start.float())
            hook = parameter.register_post_accumulate_grad_hook(self._collector(self.masters[name]))
            self._hooks.append(hook)
        self._lr_factors = [group.lr_factor for group in groups]
        self._adamw = torch.optim.AdamW(
            [
                {"params": [self.masters[name] for name in group.parameters], "weight_decay": group.weight_decay}
                for group in groups
            ],
            lr=0.0,
            betas=betas,
            eps=eps,
            fused=True,
        )

    @staticmethod
    def _collector(master: nn.Parameter):  # type: ignore[no-untyped-def]
        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                accumulate_(master.grad, parameter.grad)
            parameter.grad = None

        return collect

    def gradients(self) -> dict[str, Tensor]:
        """The accumulated float32 gradient of each parameter that has one."""
        return {name: master.grad for name, master in self.masters.items() if master.grad is not None}

    def zero_grad(self) -> None:
        """Forget the accumulated gradient."""
        for name, master in self.masters.items():
            master.grad = None
            self.parameters[name].grad = None

    def step(self, learning_rate: float, *, max_norm: float) -> float:
        """Clip the whole accumulated gradient to `max_norm` (0 is off), update, renew the compute copies.

        Returns the norm before clipping. Raises RunError, with nothing changed, when it is not finite.
        """
        grads = list(self.gradients().values())
        if not grads:
            raise RunError("no parameter received a gradient in this step: is everything masked or frozen?")
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).double()))
        if norm != norm or norm == float("inf"):
            worst = [name for name, grad in self.gradients().items() if not bool(torch.isfinite(grad).all())]
            if not worst:
                raise RunError("the gradient's norm is beyond float32: not updated; look at rewards and start model")
            raise RunError(f"the gradient is not finite in {len(worst)} parameters, first {worst[0]}: not updated")
        if max_norm and norm > max_norm:
            torch._foreach_mul_(grads, max_norm / norm)
        for group, factor in zip(self._adamw.param_groups, self._lr_factors, strict=True):
            group["lr"] = learning_rate * factor
        self.updates += 1
        self._adamw.step()
        self.zero_grad()
        self.refresh()
        return norm

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the network's own parameters."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def weights(self) -> dict[str, Tensor]:
        """The masters by name."""
        return {name: master.detach() for name, master in self.masters.items()}

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by name, for a checkpoint."""
        out: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            for key, value in self._adamw.state.get(master, {}).items():
                out[f"{name}|{key}"] = value if isinstance(value, Tensor) else torch.tensor(float(value))
        return out

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take back what `weights()` and `state()` gave, bit for bit."""
        self.updates += 1
        missing = self.masters.keys() - weights.keys()
        if missing:
            raise RunError(f"the checkpoint lacks {len(missing)} trained tensors, first {sorted(missing)[0]}")
        for name, master in self.masters.items():
            if weights[name].shape != master.shape:
                raise RunError(
                    f"the checkpoint's {name} is {list(weights[name].shape)}, the model's is {list(master.shape)}"
                )
            master.copy_(weights[name])
        self._adamw.state.clear()
        for key, value in state.items():
            name, _, field = key.partition("|")
            if name in self.masters:
                self._adamw.state[self.masters[name]][field] = value.clone()
        self.refresh()
