"""Every option of `upslope eval` changes the figures as it says: each against the same measurement made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_model import tiny_folder

from upslope.build import Policy, load_inference, make_engine
from upslope.cli import main
from upslope.data.chat import encode_prompt
from upslope.evaluation.scorer import Scorer
from upslope.rewards.functions import edit_distance
from upslope.tasks import load_task
from upslope.types import SamplingParams

TASK = '''
from upslope.tasks.base import Task, chat_prompt, select_prompts


class Vowels(Task):
    """Any number will do that another reply does not earn."""

    name = "vowels"
    inline_safe = True

    def prompts(self, split, n, *, seed):
        found = (chat_prompt(f"Say {i + 1000 * seed}.") for i in range(500))
        return select_prompts(found, split, n, name=self.name)

    def rewards(self, prompts, completions):
        return [sum(map(ord, text)) / 1000 for text in completions]
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("options") / "m"))


@pytest.fixture(scope="module")
def policy(model: str) -> Policy:
    return load_inference(model, dtype="float32")


@pytest.fixture(scope="module")
def scorer(policy: Policy) -> Scorer:
    return Scorer(policy.model, policy.tokenizer)


def rows(path: Path, *found: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    """The figures of `upslope eval` by their names."""
    assert main(["eval", *arguments, "--json", "--dtype", "float32"]) == 0, capsys.readouterr().err
    (system,) = json.loads(capsys.readouterr().out)["systems"]
    return {figure["name"]: figure for figure in system["figures"]}


def test_windows_are_as_wide_and_as_far_apart_as_asked_for(model: str, scorer: Scorer, tmp_path: Path, capsys) -> None:
    texts = ["the cat sat on the mat and " * 6, "1 + 1 = 2, " * 12]
    path = rows(tmp_path / "t.jsonl", *({"text": text} for text in texts))

    def by_hand(context: int, stride: int) -> float:
        logps = [
            x for t in texts for x in scorer.rolling([scorer.tokenizer.encode(t)], stride=stride, context=context)[0]
        ]
        return math.exp(-math.fsum(logps) / len(logps))

    wide, narrow, near = by_hand(512, 512), by_hand(64, 64), by_hand(64, 24)
    assert len({round(x, 3) for x in (wide, narrow, near)}) == 3
    for options, expected in (
        (("--context", "64"), narrow),
        (("--context", "64", "--stride", "24"), near),
    ):
        found = figures(capsys, model, "--perplexity", path, *options)
        assert found["token_perplexity"]["value"] == pytest.approx(expected, rel=1e-9), options


def test_rescoring_weighs_and_divides_as_asked_for(model: str, scorer: Scorer, tmp_path: Path, capsys) -> None:
    words = ["cat", "the cat sat on a mat", "mat", "a much longer cat sat", "the mat"]
    lists = [(words[i], [{"text": w, "score": -float((j * 7 + i) % 5)} for j, w in enumerate(words)]) for i in range(5)]
    path = rows(tmp_path / "n.jsonl", *({"reference": right, "hypotheses": given} for right, given in lists))
    tokens = {w: [*scorer.tokenizer.encode(w), scorer.tokenizer.eos_token_id] for w in words}
    logps = {w: scorer.loglikelihood([((), ids)])[0][0] for w, ids in tokens.items()}

    def by_hand(weight: float, divided: bool) -> float:
        """The share of wrong characters after each list's best by log p [/ tokens] + weight * score."""
        edits = 0
        for right, given in lists:
            totals = [
                logps[h["text"]] / (len(tokens[h["text"]]) if divided else 1) + weight * h["score"] for h in given
            ]
            edits += edit_distance(given[totals.index(max(totals))]["text"], right)
        return edits / sum(len(right) for right, _ in lists)

    expected = by_hand(0.5, True)
    assert expected not in {by_hand(0.0, False), by_hand(0.5, False), by_hand(0.0, True)}
    options = ("--rescore", path, "--length-normalized", "--score-weight", "0.5", "--language", "zh")
    assert figures(capsys, model, *options)["cer/after"]["value"] == pytest.approx(expected)


def test_answers_are_drawn_at_the_temperature_and_from_the_seed(
    model: str, policy: Policy, tmp_path: Path, capsys
) -> None:
    asked = ["abc", "why?", "1 + 1 ="]
    data = rows(tmp_path / "d.jsonl", *({"prompt": text, "completion": "x"} for text in asked))
    out = tmp_path / "a.jsonl"
    options = ("--data", data, "--metrics", "exact_match", "--max-completion-length", "9", "--samples", str(out))
    figures(capsys, model, *options, "--temperature", "1.5", "--seed", "7")
    said = [json.loads(line)["completion"] for line in out.read_text().splitlines()]
    engine = make_engine(policy, sequences=3, longest=64)
    params = SamplingParams(max_tokens=9, temperature=1.5, seed=7)
    drawn = engine.generate([policy.tokenizer.encode(text) for text in asked], params, keys=range(3))
    assert said == [completions[0].text for completions in drawn]


def test_a_task_is_asked_its_held_out_problems_at_the_temperature_and_from_the_seed(
    model: str, policy: Policy, tmp_path: Path, capsys
) -> None:
    (tmp_path / "vowels.py").write_text(TASK)
    spec = f"{tmp_path / 'vowels.py'}:Vowels"
    asked = ("--limit", "4", "--num-generations", "3", "--temperature", "1.5", "--max-completion-length", "6")
    found = figures(capsys, model, "--task", spec, *asked, "--seed", "5")["reward"]
    task = load_task(spec)
    prompts = task.prompts("eval", 4, seed=5)
    engine = make_engine(policy, sequences=12, longest=64)
    params = SamplingParams(max_tokens=6, n=3, temperature=1.5, seed=5)
    drawn = engine.generate(
        [encode_prompt(policy.tokenizer, p) for p in prompts], params, keys=[p.key for p in prompts]
    )
    earned = [x for p, one in zip(prompts, drawn, strict=True) for x in task.rewards([p] * 3, [c.text for c in one])]
    assert found["value"] == pytest.approx(math.fsum(earned) / 12, rel=1e-9)
    assert (found["n"], found["detail"]["samples"]) == (4, 3)


def test_the_judge_takes_our_answer_for_the_candidate(tmp_path: Path, capsys) -> None:
    from tests.evaluation.test_win_rate import reply, served

    def the_good_one(body: dict[str, Any], _: int):
        return reply("[[A]]" if "good" in body["messages"][1]["content"].split("Answer B:\n")[0] else "[[B]]")

    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    data = rows(tmp_path / "d.jsonl", *({"prompt": turns, "completion": f"reference {i}"} for i in range(3)))
    answers = rows(tmp_path / "h.jsonl", *({"completion": f"a good answer {i}"} for i in range(3)))
    with served(the_good_one) as (url, asked):
        found = figures(capsys, "--hypotheses", answers, "--data", data, "--judge", f"j@{url}")["win_rate"]
    assert (found["value"], found["n"]) == (1.0, 3)
    assert all("Request:\nsystem: Be brief.\n\nuser: hi\n" in one["messages"][1]["content"] for one in asked)


def test_a_benchmark_takes_the_items_that_the_seed_chooses(model: str, scorer: Scorer, tmp_path: Path, capsys) -> None:
    from upslope.evaluation.benchmarks import benchmark_figures

    data = rows(tmp_path / "s.jsonl", *({"sentence": f"a film {i}", "label": i % 2} for i in range(24)))
    by_hand = [benchmark_figures(scorer, f"sst2:{data}", limit=9, seed=seed)[0].as_json() for seed in (0, 3)]
    assert by_hand[0] != by_hand[1]
    found = figures(capsys, model, "--benchmark", f"sst2:{data}", "--limit", "9", "--seed", "3")
    assert found["accuracy"] == by_hand[1]
