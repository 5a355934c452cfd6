"""Adapters as peft itself loads them, on the layers that were named, with the base they belong to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from model_places import make_place, write_adapters
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tiny_model import tiny_folder

from upslope.build import load_inference
from upslope.cli import main
from upslope.models.attention.context import PackedContext
from upslope.models.files.adapters import base_source
from upslope.models.files.folders import write_json
from upslope.options import SFTOptions


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSLOPE_HOME", str(place / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for path in place.iterdir():
        os.symlink(path, tmp_path / path.name)


@pytest.mark.parametrize("name", ["run/checkpoints/best/model", "copy", "nested"])
def test_pefts_own_auto_class_loads_our_adapters(name: str) -> None:
    """With the base and the task out of adapter_config.json alone, and the same logits."""
    theirs = AutoPeftModelForCausalLM.from_pretrained(name)
    tokens = torch.arange(5, 65)
    policy = load_inference(name, dtype="float32")
    with torch.no_grad():
        ours = policy.model.logits(policy.model(tokens, PackedContext([len(tokens)])))
        torch.testing.assert_close(theirs(tokens[None]).logits[0], ours, rtol=1e-4, atol=1e-4)
        with theirs.disable_adapter():
            assert not torch.allclose(theirs(tokens[None]).logits[0], ours, atol=1e-2)
    config = json.loads(Path(name, "adapter_config.json").read_text())
    assert (config["task_type"], config["inference_mode"], config["peft_type"]) == ("CAUSAL_LM", True, "LORA")


def test_a_base_from_the_hub_is_named_with_its_revision(place: Path) -> None:
    folder = place / "hub" / "models--some--model" / "snapshots" / "abc"
    tiny_folder(folder)
    write_adapters(SFTOptions(model=str(folder), data="x", lora_rank=2, dtype="float32"), Path("hubs"))
    config = json.loads(Path("hubs/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/model", "abc")


def test_a_run_that_was_carried_elsewhere_falls_back_on_what_its_config_says(place: Path) -> None:
    shutil.copytree(place / "run", "carried", symlinks=True)
    file = Path("carried/checkpoints/last/model/adapter_config.json")
    said = json.loads(file.read_text())
    assert said["base_model_name_or_path"] == str(place / "folder")
    write_json(file, {**said, "base_model_name_or_path": "/not/here"})
    assert base_source(file.parent) == str(place / "folder")


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        ([], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["v_proj", "q_proj"], {"q_proj", "v_proj"}),
        (["v_proj,q_proj"], {"q_proj", "v_proj"}),
        (["layers.1.mlp.up_proj"], {"up_proj"}),
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_the_layers_that_were_named_get_adapters(
    targets: list[str], adapted: set[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of an untied model, whose output layer is linear, too, and never adapted."""
    base = tiny_folder(tmp_path / "untied", tie_word_embeddings=False)
    options = SFTOptions(model=str(base), data="x", lora_rank=2, lora_target_modules=tuple(targets))
    write_adapters(options, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in stored} == adapted
    layers = {name.split(".")[4] for name in stored}
    assert layers == ({"1"} if targets == ["layers.1.mlp.up_proj"] else {"0", "1"})
    assert AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "a")) is not None


def test_a_layer_that_is_not_there_and_an_alpha_for_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    sft = ["sft", "--model", "folder", "--data", "rows.jsonl", "--dry-run"]
    assert main([*sft, "--lora-rank", "2", "--lora-target-modules", "q_proj", "query"]) == 2
    said = capsys.readouterr().err
    assert (
        "--lora-target-modules: no linear layer is called 'query'; this model has down_proj, gate_proj, k_proj" in said
    )
    assert main([*sft, "--lora-alpha", "2"]) == 2
    assert "lora_alpha goes with lora_rank: give lora_rank" in capsys.readouterr().err
