"""The numeric self-checks: all hold here, and each notices when what it checks is broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from upslope import cli
from upslope.commands import numerics
from upslope.commands.numerics import Finding, at_most
from upslope.types import Completion


@pytest.mark.parametrize("name", numerics.CHECKS)
def test_every_check_holds(name: str) -> None:
    report = numerics.run_checks(checks={name: numerics.CHECKS[name]})
    assert report["passed"] == 1, report["checks"]


def test_report_counts_and_survives_a_raising_check() -> None:
    def broken() -> Finding:
        raise ValueError("two\nlines")

    before = torch.get_rng_state()
    report = numerics.run_checks(checks={"good": lambda: Finding(True, "x"), "bad": broken})
    assert (report["passed"], report["failed"]) == (1, 1)
    assert report["checks"][1]["detail"] == "ValueError: two lines"
    assert torch.equal(before, torch.get_rng_state())
    assert not at_most(float("nan"), 1.0, "gap").passed


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = {"fine": lambda: Finding(True, "a"), "off": lambda: Finding(False, "b")}
    monkeypatch.setattr(numerics, "CHECKS", few)
    assert cli.main(["doctor", "--numerics", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"passed", "failed", "checks"}
    assert [set(check) for check in report["checks"]] == [{"name", "passed", "detail", "seconds"}] * 2
    assert cli.main(["doctor", "--numerics"]) == 1
    assert "FAIL off" in capsys.readouterr().out


def test_a_wrong_gradient_is_noticed() -> None:
    detached = numerics._gradient(lambda logp: logp.exp() + logp.detach(), numerics.LOGP)
    assert not detached.passed


def test_wrong_gae_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = numerics.returns.gae
    monkeypatch.setattr(
        numerics.returns, "gae", lambda *a, gamma, lam, **k: real(*a, gamma=gamma, lam=lam * 0.999, **k)
    )
    assert not numerics.gae_by_definition().passed


def _nudge_one(completions: list[Completion]) -> list[Completion]:
    completions[-1].policy_logprobs[-1] += 1e-6
    return completions


@pytest.mark.parametrize(
    "check", [numerics.sampler_is_trainer, numerics.batch_does_not_matter, numerics.cache_does_not_matter]
)
def test_one_different_bit_is_noticed(check: Callable[[], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = numerics._generate, []

    def generate(*arguments: Any, **options: Any) -> list[Completion]:
        calls.append(arguments)
        found = real(*arguments, **options)
        return _nudge_one(found) if len(calls) == 1 else found

    monkeypatch.setattr(numerics, "_generate", generate)
    assert not check().passed


def test_a_wrong_split_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights normalised by each micro-batch instead of the whole step: the mean of means."""

    def reweighted(batch: Any, out: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -out.logp_N / batch.fields["weight"] / batch.num_trained, {}

    monkeypatch.setattr(numerics, "_loss", reweighted)
    assert not numerics.splitting_does_not_matter().passed


def test_a_forgetful_resume_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Any, path: Path) -> None:
        tensors, state = numerics.checkpoint.load(path)
        self.optimizer.load(tensors["weights"], {})
        self.order.load_state_dict(state["order"])

    monkeypatch.setattr(numerics._Trainer, "load", load)
    assert not numerics.resume_is_exact().passed
