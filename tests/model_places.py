"""Models under every kind of name: a folder, a run with adapters, a copy of adapters, adapters on adapters."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_model import tiny_folder

from upslope.build import load_policy
from upslope.cli import main
from upslope.options import SFTOptions

PAIR = {"prompt": "Say it.", "chosen": "It is so.", "rejected": "No."}


def write_adapters(options: SFTOptions, folder: Path) -> None:
    """Adapters as a run with lora_rank writes them, far enough from 0 to be seen."""
    policy = load_policy(options)
    trained = {n: p.detach() for n, p in policy.model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.normal_(std=0.3)
    policy.write(folder, trained)


def make_place(place: Path) -> Path:
    """A model folder, a run with adapters on it, a copy of these, and adapters on the run's."""
    folder, run = tiny_folder(place / "folder"), place / "run"
    (place / "text.txt").write_text("It is so. " * 9)
    (place / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {i}.", "completion": "It is so."}) + "\n" for i in range(9)))
    training = ["--max-steps", "2", "--eval-every", "1", "--save-every", "1", "--lora-rank", "2", "--dtype", "float32"]
    where = ["--model", str(folder), "--data", str(rows), "--eval-data", str(rows), "--output-dir", str(run)]
    assert main(["sft", *where, *training, "--learning-rate", "0.05"]) == 0
    os.symlink(run / "checkpoints" / "last" / "model", place / "adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UPSLOPE_HOME", str(place / "home"))
        write_adapters(SFTOptions(model=str(place / "run"), data="x", lora_rank=2, dtype="float32"), place / "nested")
        write_adapters(SFTOptions(model=str(folder), data="x", lora_rank=2, dtype="float32"), place / "copy")
    return place
