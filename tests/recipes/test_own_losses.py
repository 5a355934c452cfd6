"""A user's own `--loss` and `--advantage`: the numbers of the built-in ones, and one clear line for mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from exact_kit import learner_of, rewards_of, sampled, stepped, table_folder

from upslope.cli import main
from upslope.errors import ConfigError, DataError, RunError
from upslope.functional.policy_losses import clipped_surrogate
from upslope.loop.objective import LossInput
from upslope.options import GRPOOptions, PPOOptions
from upslope.recipes.grpo import GRPO, grpo
from upslope.recipes.ppo import PPO, ppo

OWN = """
import torch
from upslope.functional.policy_losses import clipped_surrogate
from upslope.functional.returns import gae


def surrogate(x, low=0.2):
    assert x.ref_logprobs is None
    assert int(x.lengths_B.sum()) == len(x.logprobs) == len(x.sequence_N)
    return clipped_surrogate(x.logprobs, x.old_logprobs, x.advantages, clip_low=low, clip_high=x.options.epsilon)


def centred(a):
    return a.by_group(lambda r_PG, mask_PG: r_PG - r_PG.mean(1, keepdim=True))


def estimated(a):
    assert a.lengths_B.sum() == a.mask_BT.sum()
    advantages = gae(a.rewards_BT, a.values_BT, a.mask_BT, gamma=a.options.gamma, lam=0.5)
    return advantages, advantages + a.values_BT


def one_for_all(x):
    return x.logprobs.mean()


def number(x):
    return 0.0


def detached(x):
    return -x.logprobs.detach()


def whole(x):
    return x.sequence_N


def ending(x):
    raise SystemExit(0)


def changing(x):
    x.advantages.mul_(2)
    return -x.logprobs * x.advantages


def looked_up(key):
    return {}[key]  # the fault


def raising(x):
    return looked_up("no key")


def too_short(a):
    return a.rewards_BT[:, :1]


def too_few(a):
    return a.rewards_B[1:]


def forgotten(a):
    a.rewards_B - 1


def three(a):
    return a.rewards_BT, a.rewards_BT, a.rewards_BT


def returning(a):
    return a.rewards_BT, a.rewards_BT


def short_returns(a):
    return a.rewards_BT, a.rewards_B


def critical(a):
    return a.values_BT


def integral(a):
    return a.rewards_B.long()


def one(a):
    return a.rewards_B[:1]


def zeroing(a):
    a.x.old_logprobs.zero_()
    return a.rewards_B


def half(a):
    advantages = a.rewards_B.clone()
    advantages[::2] = float("nan")
    return advantages
"""
FAULT = next(i for i, line in enumerate(OWN.splitlines(), 1) if "# the fault" in line)
REWARDS = rewards_of()


@pytest.fixture(scope="module")
def table_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table_folder(tmp_path_factory.mktemp("own") / "table")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def gradients(make: Any, folder: Path, **options: Any) -> dict[str, Any]:
    learner = learner_of(make, folder, **options)
    taken, _ = stepped(learner, sampled(REWARDS))
    return taken[-1].gradients


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("make", "builtin", "loss", "advantage"),
    [
        (PPO, {"epsilon": 0.03, "num_epochs": 2, "lam": 0.5}, "surrogate:low=0.03", "estimated"),
        (GRPO, {"epsilon": 0.03, "num_iterations": 2, "advantage": "dr_grpo"}, "surrogate:low=0.03", "centred"),
    ],
)
def test_the_same_formula_in_a_file_gives_the_same_gradient(
    make: Any, builtin: dict[str, Any], loss: str, advantage: str, table_model: Path, own: Path
) -> None:
    expected = gradients(make, table_model, **builtin)
    mine = {"loss": f"{own}:{loss}", "advantage": f"{own}:{advantage}"}
    found = gradients(make, table_model, **builtin | mine)
    other = gradients(make, table_model, **builtin | mine | {"loss": f"{own}:surrogate:low=0.5"})
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        assert (found[name] - g).abs().max() < 1e-12, name
    assert any((other[name] - g).abs().max() > 1e-6 for name, g in expected.items())


@pytest.mark.usefixtures("in_float64")
def test_a_function_of_the_program_is_a_loss(table_model: Path) -> None:
    def mine(x: LossInput) -> Any:
        return clipped_surrogate(x.logprobs, x.old_logprobs, x.advantages, clip_low=0.2, clip_high=0.2)

    def half(x: LossInput) -> Any:
        return mine(x).detach()

    with pytest.raises(DataError, match=r"loss = python:.*test_own_losses:.*half: it has no gradient"):
        gradients(GRPO, table_model, loss=half)
    found, expected = gradients(GRPO, table_model, loss=mine), gradients(GRPO, table_model)
    assert all((found[name] - g).abs().max() < 1e-12 for name, g in expected.items())


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("option", "name", "said"),
    [
        (
            "loss",
            "one_for_all",
            r"= .*own.py:one_for_all: it is of shape \[\] and torch.float64; it must be floats of shape \[\d+\], one",
        ),
        ("loss", "number", r"= .*own.py:number: it is of type float; it must be floats of shape \[\d+\]"),
        ("loss", "detached", r"= .*own.py:detached: it has no gradient; compute it from x.logprobs"),
        ("loss", "raising", rf"loss = .*own.py:raising: .*own.py:{FAULT}: KeyError: 'no key'"),
        ("advantage", "critical", r"= .*critical: .*own.py:\d+: DataError: there are values only where .* critic"),
        ("advantage", "integral", r"= .*integral: advantages of shape \[128\] and torch.int64; they must be floats"),
        ("advantage", "raising", r"advantage = .*own.py:raising: .*own.py:\d+: KeyError: 'no key'"),
        ("advantage", "too_short", r"= .*too_short: advantages of shape \[128, 1\] and .*; they must be .* \[128, 3\]"),
        ("advantage", "too_few", r"= .*too_few: advantages of shape \[127\] and .*; they must be .* \[128\]"),
        ("advantage", "forgotten", r"= .*forgotten: advantages of type NoneType; they must be floats"),
        ("advantage", "three", r"= .*three: advantages of type tuple; they must be floats"),
        ("advantage", "one", r"= .*one: advantages of shape \[1\] and .*; they must be .* \[128\]"),
        ("advantage", "returning", r"= .*returning: returns are for a critic, and there is none here"),
        ("advantage", "short_returns", r"returns of shape \[128\] and .*; they must be .*, sequences by tokens$"),
        ("advantage", "zeroing", r"= .*zeroing: it changes \w+_logprobs in place; work on a copy"),
        ("loss", "changing", r"= .*changing: it changes advantages in place; work on a copy"),
        ("loss", "whole", r"= .*whole: it is of shape \[\d+\] and torch.int64; it must be floats"),
        ("loss", "ending", r"= .*ending: .*own.py:\d+: SystemExit: 0"),
    ],
)
def test_what_does_not_fit_is_one_line(option: str, name: str, said: str, table_model: Path, own: Path) -> None:
    with pytest.raises(DataError, match=said):
        gradients(GRPO, table_model, **{option: f"{own}:{name}"})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["grpo", "--loss", "cliped"], "no loss is called 'cliped'; did you mean 'clipped'?"),
        (["ppo", "--loss", "sapo"], "no loss is called 'sapo'"),
        (["ppo", "--advantage", "rloo"], "no advantage is called 'rloo'"),
        (["ppo", "--loss", "nowhere.py:fn"], "nowhere.py: no such file"),
        (["grpo", "--advantage", "OWN:centered"], "has nothing called 'centered'; did you mean 'centred'?"),
        (["ppo", "--advantage", "n_step", "--n-step", "9" * 20], "it must be between 1 and 1e+06"),
        (["ppo", "--dual-clip", "1"], "dual_clip is 1.0; it must be at least 1.00001"),
        (["ppo", "--value-clip", "0"], "value_clip is 0.0; it must be at least 1e-06"),
        (["ppo", "--target-kl", "0"], "target_kl is 0.0; it must be at least 1e-12"),
        (["ppo", "--kl-coef", "1", "--kl-target", "0"], "kl_target is 0.0; it must be at least 1e-12"),
        (["ppo", "--kl-placement", "loss"], "kl_placement goes with kl_coef"),
        (["grpo", "--dynamic-sampling-rounds", "3"], "dynamic_sampling_rounds goes with dynamic_sampling"),
        (["grpo", "--no-dynamic-sampling=false"], "--no-dynamic-sampling is a switch: it takes no value, got 'false'"),
        (["ppo", "--n-step", "3"], "n_step belongs to advantage = n_step"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(
    words: list[str], said: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.replace("OWN", str(own)) for word in words] + ["--model", "no-such-model"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("make", "options"), [(grpo, GRPOOptions), (ppo, PPOOptions)])
def test_an_advantage_that_is_no_number_stops_the_run(
    make: Any, options: Any, table_model: Path, own: Path, tmp_path: Path
) -> None:
    """Neither left out as one of advantage 0 nor whitened away."""
    asked: dict[str, Any] = {"task": "chain_sum", "num_prompts": 2, "num_generations": 4, "max_completion_length": 2}
    asked |= {"num_train_prompts": 4, "eval_samples": 0, "max_steps": 1, "model": str(table_model)}
    with pytest.raises(RunError, match="is nan"):
        make(options(**asked, advantage=f"{own}:half", output_dir=str(tmp_path / "run")))


def test_a_changed_loss_is_another_run(table_model: Path, own: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "model": str(table_model),
        "loss": f"{own}:surrogate",
        "output_dir": str(tmp_path / "run"),
    }
    options |= {"task": "chain_sum", "num_prompts": 2, "num_generations": 2, "max_completion_length": 2}
    options |= {"num_train_prompts": 4, "eval_samples": 0, "max_steps": 1}
    grpo(GRPOOptions(**options))
    assert f'loss = "{own}:surrogate"' in (tmp_path / "run/config.toml").read_text()
    own.write_text(OWN + "\n# another one\n")
    with pytest.raises(RunError, match=r"own.py \(--loss\) has changed since"):
        grpo(GRPOOptions(**options | {"resume": True, "max_steps": 2}))
    shutil.rmtree(tmp_path / "run")


def surrogate(x: LossInput) -> Any:
    return clipped_surrogate(x.logprobs, x.old_logprobs, x.advantages, clip_low=0.2, clip_high=0.2)


def test_from_python(table_model: Path, tmp_path: Path) -> None:
    """No command that could not run is offered, and what only the command does is refused."""
    options: dict[str, Any] = {"model": str(table_model), "loss": surrogate, "output_dir": str(tmp_path / "run")}
    options |= {"task": "chain_sum", "num_prompts": 2, "num_generations": 2, "max_completion_length": 2}
    options |= {"num_train_prompts": 4, "eval_samples": 0, "max_steps": 1}
    with pytest.raises(ConfigError, match=r"dry_run: a recipe trains; `upslope.preview.dry_run.run\(options\)` shows"):
        grpo(GRPOOptions(**options, dry_run=True))
    assert not (tmp_path / "run").exists()
    assert "continue" not in grpo(GRPOOptions(**options))["commands"]
    assert (
        "continue"
        in grpo(GRPOOptions(**options | {"loss": "clipped", "output_dir": str(tmp_path / "two")}))["commands"]
    )


def test_an_object_cannot_come_from_a_file() -> None:
    with pytest.raises(ConfigError, match="loss = python:m:f is an object of the Python program"):
        PPOOptions(loss="python:m:f").validate()
