"""GSM8K: reading, splitting, extracting and grading answers; no reply takes long or upsets it."""

from __future__ import annotations

import json
import os
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("math_verify", reason="the extra `tasks` brings it")

from upslope.errors import DataError
from upslope.tasks import load_task
from upslope.tasks.gsm8k import extract_answer, last_box, plain_number, same_number
from upslope.types import Prompt


def write(path: Path, count: int, first: int = 0) -> Path:
    rows = [
        {
            "question": f"Ann has {i} eggs and buys 2. How many?",
            "answer": f"{i}+2=<<{i}+2={i + 2}>>{i + 2}\n#### {i + 2:,}",
        }
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def task(tmp_path: Path):
    return load_task(f"gsm8k:path={write(tmp_path / 'train.jsonl', 200)}")


def texts(prompts: list[Prompt]) -> set[str]:
    return {prompt.metadata["question"] for prompt in prompts}


def test_one_file_is_divided_by_content(task) -> None:
    train = set().union(*(texts(task.prompts("train", 100, seed=seed)) for seed in range(5)))
    held_out = set().union(*(texts(task.prompts("eval", 20, seed=seed)) for seed in range(5)))
    assert not train & held_out
    assert task.prompts("train", 10, seed=1) == task.prompts("train", 20, seed=1)[:10]
    with pytest.raises(DataError, match="35 distinct eval rows exist where 150"):
        task.prompts("eval", 150, seed=0)


def test_two_files_and_rows_in_both_are_not_trained_on(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "a.jsonl", 30), write(tmp_path / "b.jsonl", 10, first=25)
    task = load_task("gsm8k", path=str(train), eval_path=str(held_out))
    assert len(texts(task.prompts("eval", 10, seed=0))) == 10
    assert not texts(task.prompts("train", 25, seed=0)) & texts(task.prompts("eval", 10, seed=7))
    with pytest.raises(DataError, match="25 distinct train rows exist where 26"):
        task.prompts("train", 26, seed=0)


def test_a_held_out_file_is_held_out_whole_and_never_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", 40)
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")  # a row twice is one question
    task = load_task("gsm8k", eval_path=str(path))
    assert (task.size("eval"), task.size("train"), task.divided) == (40, 0, False)
    assert texts(task.prompts("eval", 40, seed=3)) == {f"Ann has {i} eggs and buys 2. How many?" for i in range(40)}
    assert task.prompts("eval", 40, seed=3) != task.prompts("eval", 40, seed=4)
    with pytest.raises(DataError, match=r"test\.jsonl is held out and there is no path to train on; add path="):
        task.prompts("train", 1, seed=0)
    with pytest.raises(
        DataError,
        match=r"40 distinct eval rows exist where 41 were asked for; ask for fewer \(--num-train-prompts; .*\)$",
    ):
        task.prompts("eval", 41, seed=0)


def test_rows_that_repeat_a_question_are_counted_and_must_agree(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", 6)
    lines = path.read_text().splitlines()
    again = [lines[2].replace("eggs", " EGGS"), lines[4], lines[2].replace("#### 4", "#### 4.0")]
    path.write_text("\n".join([*lines, *again]) + "\n")
    task = load_task("gsm8k", path=str(path), eval_path=str(path))
    assert task.size("eval") == 6
    assert task.remarks() == [f"{path}: 3 of 9 rows repeat a question and are left out"]
    assert load_task("gsm8k", path=str(write(tmp_path / "train.jsonl", 6))).remarks() == []
    path.write_text("\n".join([*lines, lines[1], "", lines[2].replace("#### 4", "#### 5")]) + "\n")
    with pytest.raises(DataError, match=rf"^{path}:9: asks what {path}:3 asks and answers '5', not '4': correct one"):
        load_task("gsm8k", eval_path=str(path)).size("eval")


def test_sizes_are_what_can_be_asked_for(task, tmp_path: Path) -> None:
    assert task.divided
    assert task.size("train") + task.size("eval") == 200
    for split in ("train", "eval"):
        assert len(task.prompts(split, task.size(split), seed=0)) == task.size(split)
        with pytest.raises(DataError):
            task.prompts(split, task.size(split) + 1, seed=0)


def test_demonstrations_earn_the_reward(task) -> None:
    prompts = task.prompts("train", 50, seed=0)
    replies = [task.demonstration(prompt)[-1].content for prompt in prompts]
    assert not any("<<" in reply for reply in replies)
    rewards = task.rewards(prompts, replies)
    assert all(reward.correct and reward.parts == {"correct": 1.0, "answered": 1.0} for reward in rewards)
    wrong = task.rewards(prompts, replies[1:] + replies[:1])
    assert not any(reward.correct for reward in wrong)


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("#### 12", "12", "12"),
        ("#### $1,234.50 in all", "$1,234.50", "$1,234.50"),
        ("#### 3\nno, #### 4", "4", "4"),
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed{5", None, "5"),
        ("The answer is 7 since 3+4=7, not 8", None, "7"),
        ("3 and then 9.", None, "9"),
        ("no number", None, None),
        ("", None, None),
    ],
)
def test_extraction(text: str, strict: str | None, loose: str | None) -> None:
    assert extract_answer(text, strict=True) == strict
    assert extract_answer(text, strict=False) == loose


@given(st.text())
def test_extraction_and_boxes_are_total(text: str) -> None:
    for strict in (True, False):
        found = extract_answer(text, strict=strict)
        assert found is None or isinstance(found, str)
    assert last_box(f"\\boxed{{{text.replace('{', '').replace('}', '')}}}") is not None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", Fraction(1234)),
        ("-$12.50", Fraction(-25, 2)),
        ("$-3", Fraction(-3)),
        ("3/4", Fraction(3, 4)),
        ("20%", Fraction(20)),
        (".5", Fraction(1, 2)),
        ("18.", Fraction(18)),
        ("1/0", None),
        ("1,23", None),
        (".", None),
        ("-", None),
        ("x", None),
        ("1e3", None),
    ],
)
def test_plain_numbers_are_exact(text: str, value: Fraction | None) -> None:
    assert plain_number(text) == value


@given(st.integers(-(10**9), 10**9))
def test_writing_a_number_differently_does_not_matter(number: int) -> None:
    for text in (str(number), f"{number:,}", f"${number:,}.00", f" {number}.0 ", f"{2 * number}/2"):
        assert same_number(text, str(number))
    assert not same_number(str(number + 1), str(number))


@pytest.mark.parametrize(
    ("found", "right"), [(r"\frac{36}{2}", True), (r"\sqrt{324}", True), ("2*9", True), (r"\frac{35}{2}", False)]
)
def test_math_verify_judges_the_rest(found: str, right: bool) -> None:
    assert same_number(found, "18") is right


@pytest.mark.parametrize(
    "found",
    [
        "9**9**9**9",
        "9^{9^{9}}",
        "10^{100000000}",
        "9!!!!",
        "1e1000000000",
        "(" * 70,
        "{" * 70,
        r"\int" * 20,
        "\x00\ud800",
        r"\infty",
        "9" * 79,
    ],
)
def test_no_answer_takes_long(found: str) -> None:
    start = time.perf_counter()
    assert same_number(found, "18") is False
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("line", "needle"),
    [
        ("{", "invalid JSON"),
        ("[1]", "'question'"),
        ('{"question": "q"}', "'answer'"),
        ('{"question": 3, "answer": "#### 1"}', "'question'"),
        ('{"question": "q", "answer": "1"}', "#### "),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, line: str, needle: str) -> None:
    file = write(tmp_path / "rows.jsonl", 2)
    file.write_text(file.read_text() + "\n" + line + "\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:4: .*{needle}"):
        load_task(f"gsm8k:path={file}").prompts("train", 1, seed=0)


def test_pipes_and_separators_inside_a_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl: cannot be read: a pipe or device, not a plain file"):
        load_task(f"gsm8k:path={tmp_path / 'pipe.jsonl'}").prompts("train", 1, seed=0)
    (tmp_path / "a.jsonl").write_text('{"question": "1\u2028+ 1?", "answer": "#### 2"}\n', encoding="utf-8")
    (prompt,) = load_task(f"gsm8k:eval_path={tmp_path / 'a.jsonl'}").prompts("eval", 1, seed=0)
    assert prompt.metadata["question"] == "1\u2028+ 1?"


def test_missing_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, needle in (("empty.jsonl", "is empty"), ("none.jsonl", "cannot be read")):
        with pytest.raises(DataError, match=needle):
            load_task(f"gsm8k:path={tmp_path / name}").prompts("train", 1, seed=0)
