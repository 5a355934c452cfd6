"""Weights that are NaN or infinite are refused where a model is loaded, in one line that names the tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from damage_kit import in_folder, inputs, refusal
from encoder_kit import encoder_folder
from safetensors.torch import load_file, save_file
from tiny_model import tiny_folder
from transformers import AutoConfig, AutoModelForCausalLM

from upslope.cli import main
from upslope.models.files.weights import load

NORM = "model.norm.weight"
COMMANDS = [
    ["generate", "--prompt", "hello", "--model", "m"],
    ["eval", "m", "--perplexity", "text.txt"],
    ["serve", "m", "--port", "0"],
    ["sft", "--data", "rows.jsonl", "--model", "m"],
    ["export", "m", "--output", "out"],
]


def spoil(folder: Path, name: str, value: float, file: str = "model.safetensors") -> Path:
    """Put one such value into the middle of a tensor."""
    state = load_file(folder / file)
    flat = state[name].view(-1)
    flat[len(flat) // 2] = value
    save_file(state, folder / file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    patch = in_folder(tmp_path)
    inputs(tmp_path)
    yield tmp_path
    patch.undo()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_with_such_a_weight_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str], command: list[str], value: float
) -> None:
    spoil(tiny_folder(work / "m"), NORM, value)
    assert f"model.safetensors: {NORM} holds NaN or infinity" in refusal(capsys, 4, *command)


def test_so_are_other_networks_and_adapters(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_folder(work / "start")
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=258, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(work / "neox")
    for each in ("tokenizer.json", "tokenizer_config.json"):
        (work / "neox" / each).write_bytes((work / "start" / each).read_bytes())
    name = "gpt_neox.final_layer_norm.bias"
    spoil(work / "neox", name, float("nan"))
    assert f"{name} holds NaN" in refusal(capsys, 4, "generate", "--prompt", "a", "--model", "neox")

    encoder_folder(work / "bert")
    name = next(key for key in load_file(work / "bert/model.safetensors") if key.endswith("LayerNorm.bias"))
    spoil(work / "bert", name, float("inf"))
    labels = ["--data", "labels.csv", "--eval-data", "labels.csv", "--max-length", "32"]
    assert f"{name} holds NaN or infinity" in refusal(capsys, 4, "classify", "--model", "bert", *labels)

    sft = ["sft", "--data", "rows.jsonl", "--model", "start", "--max-steps", "1", "--lora-rank", "2"]
    assert main([*sft, "--output-dir", "lora"]) == 0
    adapters = work / "adapters"
    (work / "lora/checkpoints/last/model").resolve().rename(adapters)
    name = next(iter(load_file(adapters / "adapter_model.safetensors")))
    spoil(adapters, name, float("nan"), "adapter_model.safetensors")
    said = refusal(capsys, 4, "export", "adapters", "--base", "start", "--output", "out")
    assert f"adapter_model.safetensors: {name} holds NaN" in said


def test_large_numbers_whose_sum_overflows_are_numbers(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    state[NORM] = torch.full_like(state[NORM], 3e38)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert float(load(folder)[NORM][0]) == pytest.approx(3e38)
