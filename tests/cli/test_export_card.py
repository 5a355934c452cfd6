"""Model cards: what runs and files say, enough to run it again, and unknown where they say nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gguf_kit import decoder_folder
from transformers import AutoModelForCausalLM

from upslope.build import load_inference
from upslope.cli import main
from upslope.models.files.sources import resolve
from upslope.models.files.weights import load
from upslope.runs.folder import Run

ROWS = [{"prompt": f"count {i} |", "completion": " ".join(map(str, range(i)))} for i in range(1, 31)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start model, rows, a run that trains every weight, and one with adapters on top of it."""
    folder = tmp_path_factory.mktemp("work")
    decoder_folder(folder / "start")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    before = Path.cwd()
    os.chdir(folder)
    try:
        common = ["--data", "rows.jsonl", "--max-steps", "2", "--batch-size", "4", "--dtype", "float32"]
        common += ["--eval-samples", "3"]
        assert main(["sft", "--model", "start", "--output-dir", "one", "--eval-every", "1", *common]) == 0
        assert main(["sft", "--model", "one", "--output-dir", "two", "--lora-rank", "2", *common]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def exported(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "counter"
    assert main(["export", str(work / "two"), "--output", str(out), "--dtype", "float32", "--verify"]) == 0
    return out


def head_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_run_is_exported_as_it_was_trained(work: Path, exported: Path) -> None:
    """The weights are those that `load_inference` uses: start, first run, adapters of the second."""
    policy = load_inference(work / "two", dtype="float32")
    tokens = torch.arange(4, 40)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(exported)(tokens[None]).logits[0]
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, load(exported)[name]), name
    assert theirs.shape[0] == 36
    one = load(resolve(work / "one"))
    assert any(not torch.equal(x, one[name]) for name, x in load(exported).items())


def test_the_head_is_what_the_hub_reads(exported: Path) -> None:
    from huggingface_hub import ModelCard

    head = head_of((exported / "README.md").read_text())
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    assert head["tags"] == ["upslope", "sft"]
    assert "base_model" not in head
    assert "license" not in head
    assert "datasets" not in head
    card = ModelCard.load(exported / "README.md")
    assert card.data.model_name == "counter"


def test_both_runs_their_data_and_their_machine_are_told(work: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    for number in (1, 2):
        assert f"upslope sft --config upslope_{number}_sft.toml" in card
        config = (exported / f"upslope_{number}_sft.toml").read_text()
        assert config == (work / ("one", "two")[number - 1] / "config.toml").read_text()
        assert f"```toml\n{config.strip()}\n```" in card
    step = resolve(work / "one").parent.name
    assert f"upslope_2_sft.toml --model new/1/checkpoints/{step} --output-dir new/2" in card
    assert "upslope export new/2 --dtype float32 --output FOLDER" in card
    assert "### 1. sft (one)" in card
    assert "### 2. sft (two)" in card
    assert "| adapters | rank 2, alpha 4, merged in float32 |" in card
    assert re.search(r"\| data \| file rows.jsonl, [\d,]+ bytes, sha256 [0-9a-f]{64} \(as found at export\) \|", card)
    assert f"| torch | {torch.__version__} |" in card
    assert "the local folder start, whose origin is not known" in card
    assert "not known: the files of the start model do not say it" in card
    assert "- transformers, float32: largest difference" in card
    environment = json.loads((work / "two" / "env.json").read_text())
    assert str(environment["pid"]) not in re.findall(r"\d+", card.split("environment")[-1].split("##")[0])
    assert environment["host"] not in card or len(environment["host"]) < 4
    assert str(work) not in card  # no path of this machine


def test_figures_are_those_of_the_exported_step(work: Path, tmp_path: Path) -> None:
    """The last step has an evaluation at the end; an earlier one its own; a step without one says so."""
    with Run.open(work / "one", read_only=True) as run:
        measured = {(e.step, e.metric): e for e in run.store.evaluations("held-out")}
    last = resolve(work / "one" / "checkpoints" / "last").parent
    assert main(["export", str(work / "one" / "checkpoints" / "last"), "--output", str(tmp_path / "a")]) == 0
    card = (tmp_path / "a" / "README.md").read_text()
    step = int(last.name.split("-")[1])
    assert f"Exported after step {step}" in card
    shown = {m: e for (s, m), e in measured.items() if s == step}
    assert shown
    for metric, row in shown.items():
        interval = "not known" if row.low is None else f"{row.low:.4g} to {row.high:.4g}"
        assert f"| {metric} | {row.value:.6g} | {interval} |" in card
    copy = tmp_path / "copy"
    shutil.copytree(work / "one", copy, symlinks=True)
    with Run.open(copy) as run:
        run.rewind(0)
    assert main(["export", str(copy / "checkpoints" / last.name), "--output", str(tmp_path / "b")]) == 0
    assert "None: nothing was measured at the exported step." in (tmp_path / "b" / "README.md").read_text()


def test_intervals_reach_the_card_and_its_head(work: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(work / "one", copy, symlinks=True)
    step = int(resolve(copy).parent.name.split("-")[1])
    with Run.open(copy) as run:
        figure = {"value": 0.25, "low": 0.2, "high": 0.31, "n": 512, "errors": 0}
        run.record_evaluation(step, "held-out", {"accuracy": figure})
    assert main(["export", str(copy), "--output", str(tmp_path / "out"), "--name", "a|b: c"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| accuracy | 0.25 | 0.2 to 0.31 | 512 |" in card
    result = head_of(card)["model-index"][0]
    assert result["name"] == "a|b: c"
    assert result["results"][0]["metrics"][0] == {"type": "accuracy", "value": 0.25}
    assert result["results"][0]["dataset"]["name"] == "held-out part of rows.jsonl"


def test_the_command_of_the_card_gives_the_same_weights(work: Path, tmp_path: Path) -> None:
    """The first run again, from the configuration in the exported folder, bit for bit."""
    assert main(["export", str(work / "one"), "--output", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    before = Path.cwd()
    os.chdir(work)
    try:
        config = str(tmp_path / "out" / "upslope_1_sft.toml")
        assert main(["sft", "--config", config, "--output-dir", str(tmp_path / "again")]) == 0
    finally:
        os.chdir(before)
    again = load(resolve(tmp_path / "again"))
    assert all(torch.equal(x, again[name]) for name, x in load(tmp_path / "out").items())


def test_what_is_not_known_is_said(work: Path, tmp_path: Path) -> None:
    assert main(["export", str(work / "start"), "--output", str(tmp_path / "a")]) == 0
    card = (tmp_path / "a" / "README.md").read_text()
    assert "Not known: the exported folder does not lie in a run of upslope." in card
    assert "None was asked for" in card
    assert "model-index" not in head_of(card)
    copy = tmp_path / "copy"
    shutil.copytree(work / "one", copy, symlinks=True)
    (copy / "env.json").write_text("{}")
    config = (copy / "config.toml").read_text().replace('"rows.jsonl"', '"gone.jsonl"').replace('"start"', '"gone/m"')
    (copy / "config.toml").write_text(config)
    assert main(["export", str(copy), "--output", str(tmp_path / "b"), "--license", "mit"]) == 0
    card = (tmp_path / "b" / "README.md").read_text()
    assert "file gone.jsonl, no longer at its place: its content is not known" in card
    assert "Environment: not recorded." in card
    assert head_of(card)["base_model"] == "gone/m"
    assert head_of(card)["license"] == "mit"


def test_base_and_licence_come_from_the_start_models_own_card(work: Path, tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path / "m")
    (folder / "README.md").write_text("---\nbase_model: someone/base\nlicense: gemma\n---\n# hm\n")
    assert main(["export", str(folder), "--output", str(tmp_path / "out")]) == 0
    head = head_of((tmp_path / "out" / "README.md").read_text())
    assert (head["base_model"], head["license"]) == ("someone/base", "gemma")
    for rubbish in ("---\n[\n---\n", "---\n- a\n---\n", "--", "---\nbase_model: 3\nlicense: [x]\n---\n"):
        (folder / "README.md").write_text(rubbish)
        assert main(["export", str(folder), "--output", str(tmp_path / "out"), "--overwrite"]) == 0
        head = head_of((tmp_path / "out" / "README.md").read_text())
        assert not {"base_model", "license"} & head.keys()


def test_hub_data_are_named_in_the_head(work: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(work / "one", copy, symlinks=True)
    config = (copy / "config.toml").read_text().replace('"rows.jsonl"', '"openai/gsm8k:main"')
    (copy / "config.toml").write_text(config)
    assert main(["export", str(copy), "--output", str(tmp_path / "out")]) == 0
    assert head_of((tmp_path / "out" / "README.md").read_text())["datasets"] == ["openai/gsm8k"]


def test_a_damaged_checkpoint_is_one_line(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(work / "one", copy, symlinks=True)
    weights = resolve(copy) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert main(["export", str(copy), "--output", str(tmp_path / "out")]) == 4
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("upslope: error:")]
    assert len(lines) == 1
    assert "this checkpoint is damaged (model/model.safetensors is damaged (its SHA-256 differs))" in lines[0]


def test_the_alias_is_named_with_its_licence(smollm2_folder: Path, tmp_path: Path) -> None:
    from upslope.commands.export_card import origin_of

    origin = origin_of(smollm2_folder, smollm2_folder)
    assert origin.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert origin.license == "apache-2.0"
