"""What a model's generation_config.json suggests is said once where text is drawn, and never taken by itself."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from letters_model import letters_folder

from upslope.cli import main
from upslope.commands.serve import _service
from upslope.options import ServeOptions

WORDS = "--temperature 0.6 --top-k 20 --top-p 0.95 --repetition-penalty 1.1"
SAID = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1, "do_sample": True}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return suggesting(letters_folder(tmp_path / "m"), SAID)


def suggesting(folder: Path, said: dict[str, Any]) -> Path:
    path = folder / "generation_config.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({"eos_token_id": kept.get("eos_token_id"), **said}))
    return folder


def generated(model: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[str, str]:
    assert main(["generate", str(model), "--prompt", "Why?", "--max-tokens", "8", "--dtype", "float32", *more]) == 0
    return capsys.readouterr()


def test_it_is_said_and_not_taken(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent = letters_folder(tmp_path / "silent")
    suggesting(silent, {})
    (drawn, said), (plain, nothing) = (generated(one, capsys) for one in (model, silent))
    assert f"suggests {WORDS}; not taken unless you say so" in said
    assert said.count("suggests") == 1
    assert "suggests" not in nothing
    assert drawn == plain
    taken, _ = generated(model, capsys, *WORDS.split())
    assert taken == generated(silent, capsys, *WORDS.split())[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--temperature", "0.9"], "suggests --top-k 20 --top-p 0.95 --repetition-penalty 1.1;"),
        (["--temperature", "0"], "suggests --repetition-penalty 1.1;"),
        (WORDS.split(), ""),
        (["--num-beams", "2"], ""),
    ],
)
def test_what_was_said_on_the_command_line_is_not_said_again(
    more: list[str], words: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = generated(model, capsys, *more)[1]
    assert words in said
    assert ("suggests" in said) == bool(words)


def test_a_greedy_model_suggests_no_way_of_drawing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suggesting(model, {**SAID, "do_sample": False})
    assert "suggests --repetition-penalty 1.1;" in generated(model, capsys)[1]


def test_chat_and_serve_say_it_too(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
    assert main(["chat", str(model), "--max-tokens", "2"]) == 0
    assert f"suggests {WORDS};" in capsys.readouterr().err
    _service("m", str(model), ServeOptions(model=str(model), dtype="float32", max_batch=1, kv_cache_gb=0.01))
    said = capsys.readouterr().err
    assert "m: the model suggests temperature 0.6 top-k 20 top-p 0.95 repetition-penalty 1.1; a request that" in said
