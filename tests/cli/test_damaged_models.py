"""A checkpoint with one flipped bit is refused at every door, in one line that names file and remedy."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage_kit import copied, flip, in_folder, inputs, make_runs, refusal

from upslope.cli import main
from upslope.errors import ModelError
from upslope.models.encoder.network import load_encoder
from upslope.models.files.folders import check_intact
from upslope.models.files.loading import load_model

RL = ["--task", "letter.py:Letter", "--max-steps", "1", "--num-prompts", "2", "--num-generations", "2"]
RL += ["--max-completion-length", "4", "--num-train-prompts", "8", "--eval-samples", "0", "--dtype", "float32"]
SFT = ["sft", "--data", "rows.jsonl", "--max-steps", "1", "--dtype", "float32"]

# run -> commands that load its model; {} is where it is damaged, start and full are whole.
DOORS: dict[str, list[list[str]]] = {
    "full": [
        ["generate", "--prompt", "hello", "--model", "{}", "--max-tokens", "2"],
        ["chat", "--model", "{}"],
        ["eval", "{}", "--perplexity", "text.txt"],
        ["eval", "start", "{}", "--perplexity", "text.txt"],
        ["serve", "{}", "--port", "0"],
        ["serve", "start", "--compare", "{}", "--port", "0"],
        ["ppo", "--model", "{}", *RL],
        ["ppo", "--model", "{}", *RL, "--dry-run"],
        ["grpo", "--model", "start", *RL, "--reward", "fluency:path={}"],
        ["distill", "--model", "start", "--teacher", "{}", *RL[:4], "--num-train-prompts", "8", "--eval-samples", "0"],
        [*SFT, "--model", "{}"],
        ["export", "{}", "--output", "out"],
    ],
    "lora": [
        ["generate", "--prompt", "hello", "--model", "{}", "--max-tokens", "2"],
        ["serve", "{}", "--port", "0"],
        ["export", "{}", "--output", "out"],
    ],
    "reward": [
        ["grpo", "--model", "start", *RL, "--reward", "reward_model:path={}"],
        ["ppo", "--model", "start", *RL, "--critic", "{}"],
        ["eval", "{}", "--preferences", "pairs.jsonl"],
    ],
    "label": [
        ["classify", "--data", "labels.csv", "--eval-data", "labels.csv", "--model", "{}", "--num-epochs", "1"],
        ["grpo", "--model", "start", *RL, "--reward", "similarity:path={}"],
        ["export", "{}", "--output", "out"],
    ],
}
NAMES = ("checkpoints/last", "checkpoints/step-00000002")
WEIGHTS = {"lora": "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Whole runs; the tests work in their folder."""
    folder = tmp_path_factory.mktemp("work")
    patch = in_folder(folder)
    inputs(folder)
    make_runs(folder)
    yield folder
    patch.undo()


@pytest.mark.parametrize(("run", "command"), [(run, c) for run, commands in DOORS.items() for c in commands])
def test_no_door_lets_a_flipped_bit_in(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: str, command: list[str]
) -> None:
    broken = copied(work, run, tmp_path / "broken")
    name = WEIGHTS.get(run, "model.safetensors")
    flip(broken / "checkpoints/last/model" / name)
    line = refusal(capsys, 4, *(each.replace("{}", str(broken)) for each in command))
    assert f"this checkpoint is damaged (model/{name} is damaged (its SHA-256 differs)); use another one of" in line
    assert str(broken / "checkpoints") in line


@pytest.mark.parametrize(
    "where", ["", "checkpoints", "checkpoints/last", "step", "step/model", "checkpoints/last/model"]
)
def test_every_name_of_a_checkpoint_is_checked(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    broken = copied(work, "full", tmp_path / "broken")
    flip(broken / "checkpoints/last/model/model.safetensors")
    source = broken / where.replace("step", "checkpoints/step-00000002")
    assert "model/model.safetensors is damaged" in refusal(
        capsys, 4, "generate", "--prompt", "hello", "--model", source
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_every_file_of_the_model_is_checked(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    broken = copied(work, "full", tmp_path / "broken")
    path = broken / "checkpoints/last/model" / name
    if how == "flipped":
        flip(path, 0.3)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.unlink()
    line = refusal(capsys, 4, "generate", "--prompt", "hello", "--model", broken)
    assert name in line if how != "gone" or name != "config.json" else "no config.json" in line


def test_the_manifest_is_called_for_and_may_not_be_rubbish(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = copied(work, "full", tmp_path / "broken")
    manifest = broken / "checkpoints/last/manifest.json"
    whole = manifest.read_text()
    for rubbish in ("", "[]", "{", '{"format": 1}', '{"format":1,"step":2,"serial":1,"best":false,"files":{"a":3}}'):
        manifest.write_text(rubbish)
        assert "manifest.json is damaged" in refusal(capsys, 4, "generate", "--prompt", "hello", "--model", broken)
    manifest.unlink()
    assert "manifest.json is missing" in refusal(capsys, 4, "generate", "--prompt", "hello", "--model", broken)
    manifest.write_text(whole)
    assert main(["generate", "--prompt", "hello", "--model", str(broken), "--max-tokens", "1"]) == 0


def test_other_parts_of_a_checkpoint_and_copies_may_differ(work: Path, tmp_path: Path) -> None:
    """What is not loaded is not hashed; a copy of the model folder is a folder like any other."""
    run = copied(work, "full", tmp_path / "run")
    flip(run / "checkpoints/last/state.json")
    assert main(["generate", "--prompt", "hello", "--model", str(run), "--max-tokens", "1"]) == 0
    shutil.copytree(run / "checkpoints/last/model", tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert main(["generate", "--prompt", "hello", "--model", str(tmp_path / "copy"), "--max-tokens", "1"]) == 0


def test_a_checkpoint_under_another_name_is_checked(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(work / "full/checkpoints/step-00000002", tmp_path / "kept")
    assert main(["generate", "--prompt", "hello", "--model", str(tmp_path / "kept/model"), "--max-tokens", "1"]) == 0
    flip(tmp_path / "kept/model/model.safetensors")
    assert "is damaged" in refusal(capsys, 4, "generate", "--prompt", "hello", "--model", tmp_path / "kept/model")


def test_the_library_checks_too(work: Path, tmp_path: Path) -> None:
    """Without the command's search for the folder."""
    for run, load in (("full", load_model), ("label", lambda folder: load_encoder(folder, "classify"))):
        broken = copied(work, run, tmp_path / run) / "checkpoints/last/model"
        load(broken)
        flip(broken / "model.safetensors")
        with pytest.raises(ModelError, match="this checkpoint is damaged"):
            load(broken)


def test_a_settled_file_is_read_once_in_a_process(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copied(work, "full", tmp_path / "run") / "checkpoints/last/model"
    files = [path for path in model.iterdir() if path.is_file()]
    for path in files:
        os.utime(path, (1_000_000_000, 1_000_000_000))
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: (read.append(file.name), digest(file, name))[1])
    check_intact(model)
    check_intact(model)
    assert len(read) == len(files)
    flip(model / "model.safetensors")
    with pytest.raises(ModelError, match="this checkpoint is damaged"):
        check_intact(model)
