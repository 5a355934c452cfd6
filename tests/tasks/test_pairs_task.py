"""Pairs of texts from files: references, splits, measures, and what is wrong with a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from upslope.errors import ConfigError, DataError
from upslope.tasks.base import content_key, load_task
from upslope.tasks.pairs import Pairs
from upslope.types import Prompt


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(i: int) -> dict[str, str]:
    return {"prompt": f"source {i}", "completion": f"target {i}"}


def test_splits_are_disjoint_and_repeat(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [pair(i) for i in range(300)])
    task = load_task(f"pairs:path={file}")
    assert isinstance(task, Pairs)
    train, held_out = task.size("train"), task.size("eval")
    assert train + held_out == 300
    assert 15 <= held_out <= 50
    first = task.prompts("train", train, seed=1)
    assert not {p.key for p in first} & {p.key for p in task.prompts("eval", held_out, seed=1)}
    assert first == load_task(f"pairs:path={file}").prompts("train", train, seed=1)
    assert first[:20] == task.prompts("train", 20, seed=1)
    assert first != task.prompts("train", train, seed=2)
    with pytest.raises(DataError, match=r"rows\.jsonl has .* 301 were asked for; ask for fewer \(--num-train-prompts;"):
        task.prompts("train", 301, seed=0)


def test_an_eval_file_is_never_trained_on(tmp_path: Path) -> None:
    rows = write(tmp_path / "train.csv.jsonl", [pair(i) for i in range(20)])
    held_out = write(tmp_path / "eval.jsonl", [{"prompt": "Source  3", "completion": "other"}, pair(40)])
    task = load_task("pairs", path=rows, eval_path=held_out)
    trained = {content_key(p.text or "") for p in task.prompts("train", 19, seed=0)}
    assert content_key("source 3") not in trained
    assert {p.text for p in task.prompts("eval", 2, seed=0)} == {"Source  3", "source 40"}
    with pytest.raises(DataError, match="nothing is left to train on"):
        load_task("pairs", path=held_out, eval_path=held_out).prompts("train", 1, seed=0)


def test_several_references_of_one_source(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "completion": c} for c in ("salut", "bonjour toi", "salut")]
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows))
    task = load_task("pairs", path=str(file), eval_path=write(tmp_path / "e.jsonl", [pair(0)]))
    (prompt,) = task.prompts("train", 1, seed=0)
    assert prompt.answer == "salut"
    assert prompt.metadata["references"] == ("salut", "bonjour toi")
    assert task.demonstration(prompt)[-1].content == "salut"
    rewards = task.rewards([prompt] * 3, ["bonjour", "bonjour toi", ""])
    assert [r.value for r in rewards] == [0.0, 1.0, 0.0]  # of equally near references the first: 1 edit of 1 word
    assert [r.correct for r in rewards] == [False, True, False]
    assert rewards[0].parts == {"edit": 0.0, "edits": 1.0, "reference_length": 1.0}


def test_pairs_that_repeat_are_counted_and_further_targets_are_references(tmp_path: Path) -> None:
    held_out = write(tmp_path / "e.jsonl", [pair(0), pair(1), {"prompt": "source 0", "completion": "other"}, pair(0)])
    task = load_task("pairs", path=write(tmp_path / "t.jsonl", [pair(2), pair(3)]), eval_path=held_out)
    assert task.remarks() == [f"{held_out}: 1 of 4 rows repeats a pair and is left out"]
    assert {p.metadata["references"] for p in task.prompts("eval", 2, seed=0)} == {("target 0", "other"), ("target 1",)}


def test_sources_that_differ_in_case_are_two_but_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"{a}b{i}", "completion": f"{i}b{a}"} for i in range(100) for a in "xX"]
    task = load_task("pairs", path=write(tmp_path / "rows.jsonl", rows), eval_fraction=0.3)
    train = task.prompts("train", task.size("train"), seed=0)
    held_out = task.prompts("eval", task.size("eval"), seed=0)
    assert len({p.key for p in train + held_out}) == 200
    assert not {(p.text or "").lower() for p in train} & {(p.text or "").lower() for p in held_out}


@pytest.mark.parametrize(
    ("metric", "value"),
    [("exact", 0.0), ("edit", 2 / 3), ("bleu", None), ("chrf", None), ("edit,unit=characters", 0.5)],
)
def test_measures(metric: str, value: float | None, tmp_path: Path) -> None:
    from upslope.rewards.functions import sentence_bleu, sentence_chrf

    file = write(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "a cat sits"}])
    task = load_task(f"pairs:path={file},eval_path={file},metric={metric}")
    (prompt,) = task.prompts("eval", 1, seed=0)
    right, wrong = task.rewards([prompt, prompt], ["a cat sits", "a cat"])
    assert right.value == pytest.approx(1.0)
    assert (right.correct, wrong.correct) == (True, False)
    if value is None:
        value = (sentence_bleu if metric == "bleu" else sentence_chrf)("a cat", ["a cat sits"])
    assert wrong.value == pytest.approx(value)


@pytest.mark.parametrize(
    ("row", "needle"),
    [
        ({"prompt": "x", "completion": ""}, r"rows\.jsonl:2: 'completion' is empty"),
        ({"prompt": " ", "completion": "y"}, r"rows\.jsonl:2: 'prompt' is empty"),
        ({"prompt": "x"}, r"rows\.jsonl:2: no column 'completion' \(it has: prompt\)"),
        ({"source": "x", "target": "y"}, r"rows\.jsonl:2: no column 'prompt' and no column 'completion'"),
        ({"prompt": "x", "completion": None}, r"rows\.jsonl:2.*completion"),
        ({"prompt": [{"role": "user", "content": "x"}], "completion": "y"}, r"rows\.jsonl:2: 'prompt' is a conversat"),
    ],
)
def test_bad_rows_are_one_clear_line(row: dict[str, Any], needle: str, tmp_path: Path) -> None:
    task = load_task("pairs", path=write(tmp_path / "rows.jsonl", [pair(1), row]))
    with pytest.raises(DataError, match=needle) as caught:
        task.prompts("train", 1, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "needle"),
    [
        ("pairs", "needs its rows"),
        ("pairs:path=x.jsonl,metric=wer", "exact, edit, bleu, chrf"),
        ("pairs:path=x.jsonl,unit=lines", "words or characters"),
        ("pairs:path=x.jsonl,eval_fraction=2.0", "eval_fraction"),
    ],
)
def test_wrong_parameters(spec: str, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        load_task(spec)


def test_a_missing_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_task("pairs", path=str(tmp_path / "none.jsonl")).prompts("train", 1, seed=0)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        load_task("pairs", path=str(tmp_path / "empty.jsonl")).prompts("train", 1, seed=0)


def test_rubbish_is_judged() -> None:
    task = Pairs(path="unused.jsonl", metric="chrf")
    prompt = Prompt(1, text="x", answer="y")
    for text in ("", "\x00", "\ud800", "a " * 5000):
        (reward,) = task.rewards([prompt], [text])
        assert 0.0 <= (reward.value or 0.0) <= 1.0


def test_a_held_out_file_may_stand_alone_and_is_measured_whole(tmp_path: Path) -> None:
    task = load_task("pairs", eval_path=write(tmp_path / "test.jsonl", [pair(i) for i in range(30)]))
    assert (task.size("eval"), task.size("train"), task.divided) == (30, 0, False)
    assert {p.text for p in task.prompts("eval", 30, seed=0)} == {f"source {i}" for i in range(30)}
    with pytest.raises(DataError, match=r"test.jsonl is held out and there is no path to train on"):
        task.prompts("train", 1, seed=0)
