"""When a comparison of an export passes, and what goes along with adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_kit import decoder_folder
from transformers import AutoModelForCausalLM

from upslope.cli import main
from upslope.commands.export_verify import Gap
from upslope.commands.llama_cpp import LlamaCpp
from upslope.data.chat import load_tokenizer
from upslope.errors import RunError


@pytest.mark.parametrize(
    ("largest", "mean", "passes"),
    [(0.2, 0.02, True), (0.21, 0.001, False), (0.1, 0.021, False), (float("nan"), 0.001, False), (0.1, 2.0, False)],
)
def test_both_bounds_count(largest: float, mean: float, passes: bool) -> None:
    gap = Gap("transformers", largest, mean, 100, largest_allowed=0.2, mean_allowed=0.02)
    if passes:
        assert gap.check() is gap
    else:
        with pytest.raises(RunError, match="the export differs from the model, so nothing was written"):
            gap.check()


def test_the_tokenizer_beside_adapters_goes_along(tmp_path: Path) -> None:
    """The one they were trained with, with its chat template, not their base's."""
    from peft import LoraConfig, get_peft_model

    base, adapter, out = (tmp_path / name for name in ("m", "adapter", "out"))
    decoder_folder(base, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    tokenizer = load_tokenizer(base)
    before = tokenizer.chat_template
    tokenizer.chat_template = "{# another #}" + before
    tokenizer.save_pretrained(adapter)
    assert main(["export", str(adapter), "--output", str(out), "--base", str(base), "--json"]) == 0
    assert load_tokenizer(out).chat_template == "{# another #}" + before
    assert load_tokenizer(base).chat_template == before
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 1


def test_a_server_has_answered_before_it_is_destroyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What /completion says comes from the loop that must have begun."""
    happened: list[str] = []

    class Server:
        def __del__(self) -> None:
            happened.append("destroyed")

    held = LlamaCpp.__new__(LlamaCpp)
    held._server, held._plain = Server(), 7
    monkeypatch.setattr(held, "_post", lambda path, body: happened.append(path), raising=False)
    with held:
        pass
    assert happened == ["/completion", "destroyed"]


CLOSED_AT_ONCE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pathlib import Path
from upslope.commands.llama_cpp import LlamaCpp
for _ in range(60):
    with LlamaCpp(Path(sys.argv[1]), context=64, threads=1):
        pass
"""


def test_a_server_that_is_closed_at_once_ends(tmp_path: Path) -> None:
    """On one core its loop may not have begun when it is destroyed; nothing in this process could end it then."""
    pytest.importorskip("xllamacpp")
    decoder_folder(tmp_path / "m")
    assert main(["export", str(tmp_path / "m"), "--output", str(tmp_path / "m.gguf"), "--format", "gguf"]) == 0
    command = [sys.executable, "-c", CLOSED_AT_ONCE, str(tmp_path / "m.gguf")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
