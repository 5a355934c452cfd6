"""`upslope eval` says where a figure is of a part of what was named, and what could not be measured."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_model import tiny_folder

from upslope.cli import main
from upslope.evaluation.measurement import Figure
from upslope.evaluation.preferences import Comparison, PairJudge, win_rate
from upslope.evaluation.table import Results, as_json, write

TASK_FILE = """
from upslope.tasks import Task, chat_prompt
from dataclasses import replace
class Letters(Task):
    name = "letters"
    def prompts(self, split, n, *, seed):
        return [replace(chat_prompt(chr(97 + i % 26) * (i + 1)), key=i) for i in range(n)]
    def rewards(self, prompts, completions):
        return [None if p.key < 3 else 1.0 for p in prompts]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("model")))


def rows(path: Path, *found: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["eval", *arguments, "--dtype", "float32"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def figure(capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> dict[str, Any]:
    report = json.loads(shown(capsys, *arguments, "--json"))
    return next(f for f in report["systems"][0]["figures"] if f["name"] == name)


def problems(path: Path, count: int) -> str:
    return rows(path, *({"question": f"{i} and 1?", "answer": f"#### {i + 1}"} for i in range(count)))


def test_a_held_out_file_is_measured_whole_and_a_limit_says_of_how_many(model: str, tmp_path: Path, capsys) -> None:
    pytest.importorskip("math_verify")
    path = problems(tmp_path / "test.jsonl", 230)  # more than the 200 of a task whose problems are endless
    spec = f"gsm8k:eval_path={path}"
    found = figure(capsys, "accuracy", model, "--task", spec, "--max-completion-length", "1")
    assert (found["n"], found["detail"]["of"]) == (230, 230)
    text = shown(capsys, model, "--task", spec, "--max-completion-length", "1", "--limit", "7")
    assert re.search(r"accuracy \S+ \[.*\] n=7 of 230\n", text)
    assert f"{spec}: 7 of 7 completions were cut at the longest length\n" in text
    assert (
        figure(capsys, "accuracy", model, "--task", spec, "--limit", "999", "--max-completion-length", "1")["n"] == 230
    )


def test_rows_that_repeat_a_question_are_said(model: str, tmp_path: Path, capsys) -> None:
    pytest.importorskip("math_verify")
    path = problems(tmp_path / "test.jsonl", 6)
    Path(path).write_text(Path(path).read_text() + "".join(Path(path).read_text().splitlines(True)[:3]))
    arguments = [
        "eval",
        model,
        "--task",
        f"gsm8k:eval_path={path}",
        "--max-completion-length",
        "1",
        "--dtype",
        "float32",
    ]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert " n=6\n" in out
    assert f"{path}: 3 of 9 rows repeat a question and are left out\n" in err


def test_a_file_that_is_divided_says_how_small_the_held_out_part_is(model: str, tmp_path: Path, capsys) -> None:
    pytest.importorskip("math_verify")
    path = problems(tmp_path / "one.jsonl", 100)
    text = shown(capsys, model, "--task", f"gsm8k:path={path}", "--max-completion-length", "1")
    n = int(re.findall(r" n=(\d+)\n", text)[0])
    assert 10 < n < 30
    assert f"only the {n} of the file's 100 different rows that are held out by content (eval_fraction)" in text


def test_a_task_without_a_size_keeps_to_two_hundred_and_errors_are_seen_in_n(
    model: str, tmp_path: Path, capsys
) -> None:
    (tmp_path / "my_task.py").write_text(TASK_FILE)
    spec = f"{tmp_path / 'my_task.py'}:Letters"
    text = shown(capsys, model, "--task", spec, "--max-completion-length", "1")
    assert "n=197 of 200\n" in text
    assert "3 could not be judged, the first: " in text


def test_every_limited_file_says_of_how_many(model: str, tmp_path: Path, capsys) -> None:
    texts = rows(tmp_path / "t.jsonl", *({"text": f"document {i}"} for i in range(9)))
    asked = rows(tmp_path / "d.jsonl", *({"prompt": f"a{i}", "completion": "b"} for i in range(8)))
    lists = rows(tmp_path / "n.jsonl", *({"reference": "a", "hypotheses": ["a", "b"]} for _ in range(7)))
    films = rows(tmp_path / "s.jsonl", *({"sentence": f"a film {i}", "label": i % 2} for i in range(6)))
    question = {"paragraph": "p", "answer": "x", "label": 1}
    group = rows(
        tmp_path / "m.jsonl", *({**question, "question": f"q{i}", "answer": a} for i in range(5) for a in "xy")
    )
    text = shown(
        capsys, model, "--limit", "3", "--perplexity", texts, "--data", asked, "--metrics", "bleu", "--rescore", lists,
        "--benchmark", f"sst2:{films}", f"multirc:{group}", "--max-completion-length", "2",
    )  # fmt: skip
    for name, of in (
        ("token_perplexity", 9), ("bleu", 8), ("wer/after", 7), ("wer/change", 7), ("accuracy", 6), ("f1a", 5),
    ):  # fmt: skip
        assert re.search(rf"  {name} .* n=3 of {of}(\n|  )", text), (name, text)
    assert "t.jsonl: 3 of 9 documents (rows)" in text
    one = shown(capsys, model, "--limit", "1", "--perplexity", texts)
    assert "t.jsonl: 1 of 9 documents (rows)" in one
    whole = shown(capsys, model, "--perplexity", texts)
    assert "t.jsonl: 9 documents (rows)" in whole
    assert " of 9" not in whole


def test_the_table_of_a_terminal_says_it_too(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    parts = [Figure("accuracy", 0.5, 0.4, 0.6, n, "d", detail={"of": 1319}) for n in (200, 198)]
    write([Results("a", parts[:1]), Results("b", parts[1:])], stream)
    assert "200 of 1319" in stream.getvalue()
    assert "198 of 1319" in stream.getvalue()


def test_contexts_and_rows_left_out_of_a_benchmark_are_told() -> None:
    stream = io.StringIO()
    detail = {"of": 9, "cut_contexts": 4, "broken_rows": 2}
    write([Results("m", [Figure("f1", 0.5, 0.4, 0.6, 9, "qqp:x", detail=detail)])], stream)
    assert "qqp:x: 4 contexts were cut from the left to fit the model\n" in stream.getvalue()
    assert "qqp:x: 2 rows are broken and left out\n" in stream.getvalue()


def test_what_a_judge_did_not_say_is_in_the_table_and_in_json() -> None:
    """Ten rows: two without a parsable verdict in either order, one whose requests are lost, one tie, one by place."""
    from tests.evaluation.test_win_rate import reply, served

    def answer(body: dict[str, Any], _: int):
        text = body["messages"][1]["content"]
        row = int(re.findall(r"q(\d)", text)[0])
        if row < 2:
            return reply("I like both")
        if row == 2:
            return 500, "overloaded", {}
        if row in (3, 4):
            return reply("[[C]]" if row == 3 else "[[A]]")
        return reply("[[A]]" if text.index("candidate") < text.index("reference") else "[[B]]")

    asked = [Comparison(f"q{i}", "candidate", "reference") for i in range(10)]
    with served(answer) as (url, _), PairJudge(url, "gpt", retries=0, sleep=lambda _: None) as judge:
        found = win_rate(judge, asked, dataset="d")
    stream = io.StringIO()
    write([Results("m", [found])], stream)
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith(" n=7 of 10")
    assert lines[1] == (
        "d: 5 wins, 2 ties, 0 losses by gpt; 1 rows by position alone; 3 rows not judged: 4 verdicts unparsable, 2 lost"
    )
    assert lines[2] == "d: the first unparsable verdict: the last line is no verdict: 'I like both'"
    assert lines[3] == "d: the first lost verdict: no answer after 1 tries, status 500: overloaded"
    detail = as_json([Results("m", [found])])["systems"][0]["figures"][0]["detail"]
    assert {name: detail[name] for name in ("of", "wins", "ties", "losses", "inconsistent")} == {
        "of": 10, "wins": 5, "ties": 2, "losses": 0, "inconsistent": 1,
    }  # fmt: skip
    assert (detail["not_judged"], detail["unparsable"], detail["failed"]) == (3, 4, 2)


def test_a_perfect_judge_has_nothing_missing_to_tell_but_says_so() -> None:
    stream = io.StringIO()
    detail = {"judge": "j", "wins": 1, "ties": 0, "losses": 1, "inconsistent": 0, "not_judged": 0}
    detail |= {"unparsable": 0, "failed": 0}
    write([Results("m", [Figure("win_rate", 0.5, 0.1, 0.9, 2, "d", detail=detail)])], stream)
    assert "0 rows not judged: 0 verdicts unparsable, 0 lost\n" in stream.getvalue()
    assert "first" not in stream.getvalue()
