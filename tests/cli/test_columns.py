"""--columns wherever rows are read: a file whose columns have other names is the file with the usual ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from encoder_kit import tiny_encoder, tokenizer_for
from generate_kit import WORDS, generate, rows_of, write
from letters_model import letters_folder
from tiny_model import tiny_folder, tiny_tokenizer

from upslope.cli import main
from upslope.commands.evaluate_inputs import Inputs
from upslope.errors import ConfigError, DataError
from upslope.loop.expert_rows import load_mix
from upslope.loop.pairs import PairData
from upslope.options import EvalOptions, ExpertOptions, GenerateOptions, Seq2SeqOptions
from upslope.tasks.base import load_task

PAIRS = [{"prompt": word, "completion": word[::-1]} for word in WORDS]
NAMED = ("prompt=question", "completion=my answer")


def files(folder: Path, rows: list[dict[str, Any]], names: tuple[str, ...] = NAMED) -> tuple[str, str]:
    """The rows under their usual names, and under those of `names`."""
    other = dict(name.split("=") for name in names)
    renamed = [{other.get(key, key): value for key, value in row.items()} for row in rows]
    return write(folder / "usual.jsonl", rows), write(folder / "other.jsonl", renamed)


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(letters_folder(tmp_path / "tiny", seed=2))
    usual, other = files(tmp_path, PAIRS[:3])
    assert generate("--prompts", usual, model=model) == 0
    expected = rows_of(capsys.readouterr().out)
    assert generate("--prompts", other, "--columns", *NAMED, model=model) == 0
    assert rows_of(capsys.readouterr().out) == expected
    assert expected[0]["reference"] == WORDS[0][::-1]
    assert generate("--prompts", other, "--columns", "prompt=q", model=model) == 3
    assert "other.jsonl:1: no column 'q' to take prompt from; there are question, my answer" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_eval_of_data(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "classifier":
        encoder, metric = tiny_encoder("classify", labels=["up", "down"]), "accuracy"
        model = str(encoder.save(tmp_path / "model", tokenizer=tokenizer_for("bert")))
        names = ("text=line", "label=said")
        usual, other = files(tmp_path, [{"text": f"good {x}", "label": "up"} for x in "abc"], names)
    else:
        model, metric, names = str(tiny_folder(tmp_path / "model")), "chrf", NAMED
        usual, other = files(tmp_path, PAIRS[:3])
    said = []
    for path, more in ((usual, ()), (other, ("--columns", *names))):
        arguments = ["--data", path, *more, "--metrics", metric, "--max-completion-length", "3", "--dtype", "float32"]
        assert main(["eval", model, *arguments, "--json"]) == 0
        (figure,) = json.loads(capsys.readouterr().out)["systems"][0]["figures"]
        said.append((figure["value"], figure["n"]))
    assert said[0] == said[1]


def test_eval_of_a_tagger_has_no_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = tiny_encoder("tag", labels=["O", "B-X"])
    model = str(encoder.save(tmp_path / "model", tokenizer=tokenizer_for("bert")))
    (tmp_path / "x.conll").write_text("we O\n")
    arguments = ["--data", str(tmp_path / "x.conll"), "--metrics", "entity_f1", "--columns", "text=line"]
    assert main(["eval", model, *arguments]) == 2
    assert "columns: model is a tagger, whose files name no columns; leave it out" in capsys.readouterr().err


def test_eval_of_preferences_and_of_references_alone(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": "f"}]
    names = ("chosen=good", "rejected=bad")
    usual, other = files(tmp_path, rows, names)
    (found,) = Inputs(EvalOptions(models=("m",), preferences=(other,), columns=names)).preferences.values()
    (expected,) = Inputs(EvalOptions(models=("m",), preferences=(usual,))).preferences.values()
    assert [(r.prompt, r.chosen, r.rejected) for r in found] == [(r.prompt, r.chosen, r.rejected) for r in expected]
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match="no column 'q' to take prompt from; there are text"):
        _ = Inputs(EvalOptions(data=str(tmp_path / "lines.txt"), columns=("prompt=q",))).samples


def test_what_expert_mixes_in(tmp_path: Path) -> None:
    usual, other = files(tmp_path, PAIRS)
    expected, _ = load_mix(ExpertOptions(mix_data=usual, mix_ratio=0.5), tiny_tokenizer())
    found, _ = load_mix(ExpertOptions(mix_data=other, mix_ratio=0.5, columns=NAMED), tiny_tokenizer())
    assert [row.example for row in found] == [row.example for row in expected]
    assert len(found) == len(WORDS)


def test_pairs_of_seq2seq_and_of_the_task(tmp_path: Path) -> None:
    usual, other = files(tmp_path, PAIRS)
    expected = PairData.of(Seq2SeqOptions(data=usual))
    found = PairData.of(Seq2SeqOptions(data=other, columns=NAMED))
    assert (found.train, found.held_out) == (expected.train, expected.held_out)
    _, plain = files(tmp_path, PAIRS, ("prompt=en", "completion=de"))
    task = load_task(f"pairs:path={plain},columns=prompt=en;completion=de,eval_fraction=0.5")
    usual_task = load_task(f"pairs:path={usual},eval_fraction=0.5")
    n = usual_task.size("train")
    assert n is not None
    assert task.prompts("train", n, seed=0) == usual_task.prompts("train", n, seed=0)
    with pytest.raises(ConfigError, match="columns: 'source=en' is not NAME=COLUMN"):
        load_task(f"pairs:path={plain},columns=source=en")


@pytest.mark.parametrize(
    "options",
    [
        EvalOptions(models=("m",), perplexity=("t",), columns=("text=line",)),
        GenerateOptions(prompt="Why?", columns=("prompt=q",)),
        ExpertOptions(columns=("prompt=q",)),
        Seq2SeqOptions(task="phonemes", columns=("prompt=q",)),
    ],
    ids=lambda options: type(options).__name__,
)
def test_columns_of_no_rows_are_refused(options: Any) -> None:
    with pytest.raises(ConfigError, match=r"columns (is about the rows of|goes with)"):
        options.validate()
