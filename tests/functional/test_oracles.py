"""Independent libraries as oracles: stable-baselines3 and torchrl. Skipped where they are not installed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from upslope.functional.returns import discounted_returns, gae, lambda_returns, vtrace

pytestmark = pytest.mark.oracle
T = 12


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_row03_gae_equals_stable_baselines3(gamma: float, lam: float) -> None:
    buffers = pytest.importorskip("stable_baselines3.common.buffers", reason="pip install stable-baselines3")
    spaces = pytest.importorskip("gymnasium.spaces", reason="pip install gymnasium")
    rng = np.random.default_rng(0)
    B = 4
    rewards, values = rng.normal(size=(2, T, B)).astype(np.float32)
    last_values = rng.normal(size=B).astype(np.float32)
    box, discrete = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)
    buffer = buffers.RolloutBuffer(T, box, discrete, gae_lambda=lam, gamma=gamma, n_envs=B)
    starts = np.zeros(B, dtype=np.float32)
    for t in range(T):
        buffer.add(np.zeros((B, 1)), np.zeros((B, 1)), rewards[t], starts, torch.tensor(values[t]), torch.zeros(B))
    # row b is cut off (bootstrap) where dones is 0, ended where it is 1
    dones = np.array([0, 1, 0, 1], dtype=np.float32)
    buffer.compute_returns_and_advantage(torch.tensor(last_values), dones)
    r, v = torch.tensor(rewards.T), torch.tensor(values.T)
    ours = gae(
        r, v, torch.ones(B, T), gamma=gamma, lam=lam, bootstrap_B=torch.tensor(last_values) * torch.tensor(1 - dones)
    )
    torch.testing.assert_close(ours, torch.tensor(buffer.advantages.T), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours + v, torch.tensor(buffer.returns.T), rtol=1e-5, atol=1e-6)


class TestTorchRL:
    @pytest.fixture(autouse=True)
    def _float64(self) -> Iterator[None]:
        # torchrl multiplies gamma into the default dtype, so float64 inputs alone are not exact
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(before)

    def data(self) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        rewards, values, logp, log_mu = torch.randn(4, 5, T, generator=g)
        bootstrap = torch.randn(5, generator=g)
        ended = torch.tensor([True, False, True, False, False])
        done = torch.zeros(5, T, 1, dtype=torch.bool)
        done[:, -1] = True
        terminated = done & ended[:, None, None]
        following = torch.cat([values[:, 1:], bootstrap[:, None]], 1)
        return {
            "rewards": rewards, "values": values, "logp": logp, "log_mu": log_mu, "following": following,
            "bootstrap": torch.where(ended, 0.0, bootstrap), "done": done, "terminated": terminated,
        }  # fmt: skip

    @pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.3)])
    def test_row03_against_torchrl(self, gamma: float, lam: float) -> None:
        functional = pytest.importorskip("torchrl.objectives.value.functional", reason="pip install torchrl")
        d = self.data()
        column = {k: v.unsqueeze(-1) for k, v in d.items() if v.dim() == 2}
        ours = {"gamma": gamma, "bootstrap_B": d["bootstrap"]}
        ones = torch.ones(5, T)
        advantage, target = functional.generalized_advantage_estimate(
            gamma, lam, column["values"], column["following"], column["rewards"], d["done"], d["terminated"]
        )
        close = {"rtol": 0.0, "atol": 1e-12}
        torch.testing.assert_close(
            gae(d["rewards"], d["values"], ones, lam=lam, **ours), advantage.squeeze(-1), **close
        )
        torch.testing.assert_close(
            lambda_returns(d["rewards"], d["values"], ones, lam=lam, **ours), target.squeeze(-1), **close
        )
        monte_carlo = functional.td1_return_estimate(
            gamma, column["following"], column["rewards"], d["done"], d["terminated"]
        )
        torch.testing.assert_close(discounted_returns(d["rewards"], ones, **ours), monte_carlo.squeeze(-1), **close)

    @pytest.mark.parametrize("clip", [1.0, 2.0])
    def test_vtrace_against_torchrl(self, clip: float) -> None:
        functional = pytest.importorskip("torchrl.objectives.value.functional", reason="pip install torchrl")
        d = self.data()
        c = {k: v.unsqueeze(-1) for k, v in d.items() if v.dim() == 2}
        advantage, target = functional.vtrace_advantage_estimate(
            0.9, c["logp"], c["log_mu"], c["values"], c["following"], c["rewards"], d["done"], d["terminated"],
            rho_thresh=clip, c_thresh=clip,
        )  # fmt: skip
        ours, targets = vtrace(
            d["logp"] - d["log_mu"], d["rewards"], d["values"], torch.ones(5, T), gamma=0.9,
            rho_clip=clip, c_clip=clip, bootstrap_B=d["bootstrap"],
        )  # fmt: skip
        torch.testing.assert_close(targets, target.squeeze(-1), rtol=0, atol=1e-12)
        torch.testing.assert_close(ours, advantage.squeeze(-1), rtol=0, atol=1e-12)
