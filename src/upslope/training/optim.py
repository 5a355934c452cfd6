"""AdamW on float32 master weights, with the network computing in its own dtype, and its learning rate.

A processor that multiplies bfloat16 faster than float32 should compute in bfloat16; an update of 1e-6 of a weight is
lost in it. So the optimizer owns float32 masters; the network holds copies in the compute dtype, renewed once per
update; gradients of every micro-batch are added up in float32. The learning rate is a pure function of the optimizer
step, so that a resumed run cannot get it wrong.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from upslope.devices.hardware import keep_freed_memory
from upslope.errors import ConfigError, RunError
from upslope.kernels.rows import accumulate_
from upslope.options import EncoderOptions, ExpertOptions, PretrainOptions, RunOptions, Seq2SeqOptions, SFTOptions
from upslope.options.finetune import PreferenceData


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


def _collect(master: nn.Parameter, parameter: Tensor) -> None:
    """Moves a gradient of the compute dtype to the master's, in float32."""
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        accumulate_(master.grad, parameter.grad)
    parameter.grad = None


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
            collect = partial(_collect, self.masters[name])
            self._hooks.append(parameter.register_post_accumulate_grad_hook(collect))
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
        return {
            f"{name}|{key}": value if isinstance(value, Tensor) else torch.tensor(float(value))
            for name, master in self.masters.items()
            for key, value in self._adamw.state.get(master, {}).items()
        }

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


ScheduleKind = Literal["constant", "linear", "cosine"]


def learning_rate(
    step: int, *, base: float, total_steps: int, warmup_steps: int = 0, kind: ScheduleKind = "linear"
) -> float:
    """The learning rate of update number `step` (0 is the first of `total_steps`).

    With W warm-up updates and S = `total_steps`: it rises as base * (step + 1) / (W + 1), so that no update is wasted
    on a rate of 0, and reaches base, the peak rate, at step W. From there, with progress p = (step - W) / (S - W):

        constant   base
        linear     base * (1 - p)
        cosine     base * (1 + cos(pi * p)) / 2

    The last two reach 0 at step S, one after the last update, and stay there.

    Raises:
        ConfigError: a value outside its range; the message names it.

    Sources: linear warm-up Goyal et al. 2017 (arXiv:1706.02677); cosine Loshchilov and Hutter 2017 (arXiv:1608.03983).
    """
    kinds = get_args(ScheduleKind)
    for wrong, said in (
        (kind not in kinds, f"learning-rate schedule {kind!r} is not one of {', '.join(kinds)}"),
        (step < 0, f"step {step} must be >= 0"),
        (not (math.isfinite(base) and base >= 0.0), f"learning rate {base} must be finite and >= 0"),
        (total_steps < 1, f"total_steps {total_steps} must be >= 1"),
        (warmup_steps < 0, f"warmup_steps {warmup_steps} must be >= 0"),
        (warmup_steps > total_steps, f"warmup_steps {warmup_steps} exceeds the run's {total_steps} updates"),
    ):
        if wrong:
            raise ConfigError(said)
    if step < warmup_steps:
        return base * (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return base
    left = total_steps - warmup_steps
    progress = min(1.0, (step - warmup_steps) / left) if left else 1.0
    return base * (1.0 - progress if kind == "linear" else (1.0 + math.cos(math.pi * progress)) / 2.0)


def rate_at(o: RunOptions, step: int) -> float:
    """The learning rate of a run's update number `step`, as its options say."""
    return learning_rate(
        step, base=o.learning_rate, total_steps=o.max_steps, warmup_steps=o.warmup_steps, kind=o.lr_scheduler_type
    )


_IN_PASSES = PretrainOptions | SFTOptions | Seq2SeqOptions | EncoderOptions | PreferenceData
"""Whose num_epochs are passes over the data, and not over a step's rollouts."""


def in_steps(options: Any, items: int | None = None) -> Any:
    """The options with max_steps in place of num_epochs (passes over `items`) or of an expert's num_rounds."""
    if isinstance(options, ExpertOptions) and options.num_rounds is not None:
        return replace(options, max_steps=options.num_rounds * options.train_steps, num_rounds=None)
    if items is None or not isinstance(options, _IN_PASSES) or options.num_epochs is None:
        return options
    return replace(options, max_steps=max(1, round(options.num_epochs * items / options.batch_size)), num_epochs=None)
