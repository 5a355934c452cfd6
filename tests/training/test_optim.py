"""What the optimizer does with several tensors, groups and micro-batches, by hand.

An eps of 1 makes AdamW's first step lr * g / (|g| + 1), which shows the gradient it was given; with the usual eps the
first step is lr * sign(g) whatever the gradient's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_folder
from torch import Tensor, nn

from upslope.build import load_critic, load_policy, make_optimizer, take_masters
from upslope.errors import RunError
from upslope.models.files.weights import load as load_weights
from upslope.options import SFTOptions
from upslope.training.optim import Group, MasterAdamW


def backward(parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]) -> None:
    """One micro-batch whose gradient is the given one."""
    torch.stack([(parameters[name].float() * g).sum() for name, g in gradients.items()]).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_norm_for_all_tensors_and_micro_batches(dtype: torch.dtype) -> None:
    """Two micro-batches, two tensors: the norm of the whole is 13, and all of it shrinks by 6.5 / 13."""
    parameters = {"a": nn.Parameter(torch.zeros(2, dtype=dtype)), "b": nn.Parameter(torch.zeros(1, 1, dtype=dtype))}
    optimizer = MasterAdamW([Group(parameters)], eps=1.0)
    backward(parameters, {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[8.0]])})
    backward(parameters, {"a": torch.tensor([0.0, 0.0]), "b": torch.tensor([[4.0]])})
    assert optimizer.step(0.1, max_norm=6.5) == 13.0
    clipped = {"a": torch.tensor([1.5, 2.0]), "b": torch.tensor([[6.0]])}
    for name, g in clipped.items():
        torch.testing.assert_close(optimizer.weights()[name], -0.1 * g / (g + 1))


def test_micro_batches_add_up_in_float32() -> None:
    """1 and 2^-9 are 1 in bfloat16; the optimizer sees their sum, and nothing of a step in the next."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([Group({"p": p})])
    for _ in range(2):
        for g in (1.0, 2**-9, 2**-9):
            backward({"p": p}, {"p": torch.tensor([g])})
        assert optimizer.gradients()["p"].tolist() == [1 + 2**-8]
        optimizer.step(0.0, max_norm=0.0)


def test_every_group_has_its_own_rate_and_decay() -> None:
    """w (1 - lr f wd) - lr f sign(g), by group, at each step's rate."""
    plain, fast = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0]))
    groups = [Group({"plain": plain}, weight_decay=0.5), Group({"fast": fast}, lr_factor=10.0, weight_decay=0.1)]
    optimizer = MasterAdamW(groups)
    expected = torch.tensor([1.0, 2.0])
    for rate in (0.01, 0.001):
        backward({"plain": plain, "fast": fast}, {"plain": torch.ones(1), "fast": -torch.ones(1)})
        optimizer.step(rate, max_norm=0.0)
        steps = rate * torch.tensor([1.0, 10.0])
        expected = expected * (1 - steps * torch.tensor([0.5, 0.1])) - steps * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(torch.cat([plain.detach(), fast.detach()]), expected, rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


def test_weight_decay_of_the_options_shrinks_matrices_alone(folder: Path) -> None:
    """Without a gradient's pull a step leaves w (1 - lr wd) of a matrix, and a norm's weight as it was."""
    options = SFTOptions(model=str(folder), data="rows.jsonl", dtype="float32", weight_decay=0.25)
    policy = load_policy(options)
    optimizer = make_optimizer(policy, options)
    before = {name: x.clone() for name, x in optimizer.weights().items()}
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5, max_norm=0.0)
    for name, x in optimizer.weights().items():
        torch.testing.assert_close(x, before[name] * (0.875 if x.dim() > 1 else 1.0))


def test_masters_are_the_folders_own_float32_weights(folder: Path) -> None:
    """The network computes in bfloat16; what is trained and saved starts from every bit of the folder."""
    options = SFTOptions(model=str(folder), data="rows.jsonl", dtype="bfloat16")
    policy = load_policy(options)
    masters = make_optimizer(policy, options).weights()
    stored = load_weights(folder)
    assert masters.keys() == stored.keys()
    assert all(torch.equal(x, stored[name]) for name, x in masters.items())
    named = dict(policy.model.named_parameters())
    assert all(torch.equal(named[name], x.bfloat16()) for name, x in stored.items())
    assert any(not torch.equal(x, x.bfloat16().float()) for x in stored.values())


def test_the_masters_are_taken_once(folder: Path) -> None:
    """A second optimizer would train from rounded weights; where nothing is rounded it has the weights themselves."""
    options = SFTOptions(model=str(folder), data="rows.jsonl", dtype="bfloat16")
    policy = load_policy(options)
    critic = load_critic(policy, "separate", options)
    make_optimizer(policy, options)
    with pytest.raises(RunError, match=r"weights of this policy are another optimizer's.*load it again"):
        make_optimizer(policy, options)
    assert take_masters(critic).keys() == {f"critic.{name}" for name, _ in policy.model.named_parameters()}
    with pytest.raises(RunError, match="weights of this critic are another optimizer's"):
        take_masters(critic)
    full = SFTOptions(model=str(folder), data="rows.jsonl", dtype="float32")
    policy = load_policy(full)
    first, second = make_optimizer(policy, full).weights(), make_optimizer(policy, full).weights()
    assert all(torch.equal(first[name], x) for name, x in second.items())
