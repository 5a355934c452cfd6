"""lora_dropout in whole recipes: one gradient for every split, the bits of a resume, none where it measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import watch
from preference_kit import pair_rows
from supervised_kit import LEARNERS, jsonl, network_of, pairs_file, sft_learner, texts_file, tiny
from tiny_model import tiny_folder

from upslope.cli import main
from upslope.errors import ConfigError
from upslope.options import DistillOptions, ExpertOptions, GRPOOptions, PPOOptions, ReinforceOptions, SFTOptions
from upslope.recipes.sft import sft


def stir(learner: Any) -> None:
    """Adapters that say something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in network_of(learner).named_parameters():
            if ".lora_B." in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))


@pytest.mark.parametrize("recipe", ["sft", "classify", "tag"])
def test_the_gradient_knows_no_micro_batches_and_no_measurement_knows_dropout(recipe: str, tmp_path: Path) -> None:
    found, measured = [], []
    for changes in (
        {"lora_dropout": 0.5},
        {"lora_dropout": 0.5, "micro_batch_tokens": 1},
        {"lora_dropout": 0.5, "gradient_checkpointing": True},
        {"lora_dropout": 0.5, "seed": 1},
        {},
    ):
        learner = LEARNERS[recipe](tmp_path, lora_rank=2, learning_rate=0.0, **changes)
        stir(learner)
        taken = watch(learner.optimizer)
        for step in range(2):
            learner.step(step)
        found.append([x for one in taken for x in one.gradients.values()])
        measured.append(learner.evaluate(2).metrics)
    for other in found[1:3]:
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found[0], other, strict=True))
    for other in found[3:]:
        assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(found[0], other, strict=True) if a.any())
    assert measured[0] == measured[2] == measured[4]


def test_in_float32_the_gradient_is_that_of_any_split_to_a_millionth(tmp_path: Path) -> None:
    found = []
    for tokens in (1, 4096):
        learner = sft_learner(tmp_path, lora_rank=2, lora_dropout=0.3, micro_batch_tokens=tokens)
        learner.policy.model.float()
        stir(learner)
        taken = watch(learner.optimizer)
        learner.step(0)
        found.append(torch.cat([x.flatten() for x in taken[0].gradients.values()]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-6


def test_a_run_resumed_in_the_middle_has_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    """And its folder of adapters says what they were trained with."""

    def go(name: str, steps: int, **more: Any) -> Path:
        data = pairs_file(tmp_path / "rows.jsonl")
        common: dict[str, Any] = {"model": tiny(), "lora_rank": 2, "lora_dropout": 0.5, "lr_scheduler_type": "constant"}
        common |= {"batch_size": 2, "eval_every": 0, "learning_rate": 0.01, "output_dir": str(tmp_path / name)}
        sft(SFTOptions(data=data, max_steps=steps, **common | more))
        return tmp_path / name / "checkpoints/last/model"

    whole, half, plain = go("whole", 4), go("parts", 2), go("plain", 4, lora_dropout=0.0)
    parts = go("parts", 4, resume=True)
    tensors = "adapter_model.safetensors"
    assert (parts / tensors).read_bytes() == (whole / tensors).read_bytes() != (plain / tensors).read_bytes()
    told = [json.loads((x / "adapter_config.json").read_text())["lora_dropout"] for x in (whole, half, plain)]
    assert told == [0.5, 0.5, 0.0]


def arguments(verb: str, folder: Path) -> list[str]:
    """A small run of the verb."""
    pairs, teacher = pairs_file(folder / "pairs.jsonl"), str(folder / "teacher")
    if verb == "distill" and not Path(teacher).exists():
        tiny_folder(Path(teacher), seed=1, initializer_range=0.2)
    own = {
        "sft": ["--data", pairs],
        "dpo": ["--data", jsonl(folder / "preferences.jsonl", pair_rows(8))],
        "reward": ["--data", jsonl(folder / "preferences.jsonl", pair_rows(8))],
        "pretrain": ["--data", texts_file(folder / "texts.jsonl"), "--context-length", "8"],
        "distill": ["--data", pairs, "--teacher", teacher, "--on-policy-fraction", "0", "--num-prompts", "2"],
        "expert": ["--max-completion-length", "4", "--num-prompts", "4", "--keep", "top", "--truncated", "terminate"],
    }
    return [verb, *own[verb], "--model", tiny(), "--dtype", "float32", "--eval-samples", "1", "--eval-every", "0"]


@pytest.mark.parametrize("verb", ["sft", "dpo", "reward", "pretrain", "distill", "expert"])
def test_every_verb_that_takes_it_has_it(verb: str, tmp_path: Path) -> None:
    """New adapters change nothing at the first step; then the losses part."""
    losses = []
    for share in ("0", "0.5"):
        folder = tmp_path / share
        adapters = ["--lora-rank", "2", "--lora-dropout", share, "--learning-rate", "0.05", "--max-steps", "3"]
        assert main([*arguments(verb, tmp_path), *adapters, "--output-dir", str(folder)]) == 0
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert losses[0][2] != pytest.approx(losses[1][2], rel=1e-6)


@pytest.mark.parametrize("kind", [ReinforceOptions, PPOOptions, GRPOOptions, DistillOptions])
def test_what_trains_on_its_own_samples_has_none(kind: Any) -> None:
    more = {"teacher": "t", "data": "d"} if kind is DistillOptions else {}
    with pytest.raises(ConfigError, match=r"lora_dropout is 0\.1, but .* sampled it, and a network with dropout is"):
        kind(lora_rank=2, lora_dropout=0.1, **more).validate()
    kind(lora_rank=2, **more).validate()
    ExpertOptions(lora_rank=2, lora_dropout=0.1).validate()
    DistillOptions(lora_rank=2, lora_dropout=0.1, teacher="t", data="d", on_policy_fraction=0.0).validate()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_rank": 2, "lora_dropout": 1.0}, r"lora_dropout is 1\.0; it must be between 0 and 0\.99"),
        ({"lora_rank": 2, "lora_dropout": float("nan")}, "lora_dropout is nan"),
        ({"lora_dropout": 0.1}, "lora_dropout goes with lora_rank: give lora_rank"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SFTOptions(data="x", **changes).validate()
