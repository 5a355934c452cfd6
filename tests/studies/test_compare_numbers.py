"""What a comparison says about runs whose outcome is known: signs, seeds, and what each number is measured on."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from upslope.evaluation.measurement import bootstrap_mean, paired_bootstrap
from upslope.options import CompareOptions
from upslope.studies import compare as module
from upslope.studies.compare import compare, measure, pairs, summarise, table
from upslope.types import Prompt, Reward, Rollout, RolloutGroup, SamplingParams

START = [0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
BETTER = [[0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]]
WORSE = [[0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]


def measured(quality: list[float], kl: float = 0.0) -> dict[str, Any]:
    return {
        "quality": quality,
        "metric": "accuracy",
        "kl": kl,
        "distinct_1": 0.5,
        "distinct_2": 0.75,
        "self_bleu": 0.1,
        "calibration": None,
        "replies": [],
    }


@pytest.fixture
def result() -> dict[str, Any]:
    runs = {
        label: {str(seed): measured(quality, kl=seed + 1.0) for seed, quality in enumerate(found)}
        for label, found in (("better", BETTER), ("worse", WORSE))
    }
    return {"start": measured(START), "runs": runs, "folder": "c"}


def test_gains_are_over_the_start_and_pair_its_problems(result: dict[str, Any]) -> None:
    rows = {row["label"]: row for row in summarise(result)}
    for label, found in (("better", BETTER), ("worse", WORSE)):
        mean = [sum(column) / 2 for column in zip(*found, strict=True)]
        assert rows[label]["by_seed"] == [sum(x) / 8 for x in found]
        assert tuple(rows[label]["quality"].values()) == (*bootstrap_mean(mean), 8)
        assert tuple(rows[label]["gain"].values()) == tuple(paired_bootstrap(mean, START))
    assert rows["better"]["gain"]["value"] == 13 / 16 - 2 / 8
    assert rows["worse"]["gain"]["value"] < 0 < rows["better"]["gain"]["low"]
    assert rows["better"]["kl"] == 1.5


def test_a_pair_is_the_later_minus_the_earlier(result: dict[str, Any]) -> None:
    (pair,) = pairs(result)
    assert (pair["a"], pair["b"]) == ("better", "worse")
    assert pair["value"] == 1 / 16 - 13 / 16
    assert pair["low"] <= pair["value"] <= pair["high"] < 0


def test_only_an_interval_without_zero_is_called_so(result: dict[str, Any]) -> None:
    row = {"a": "x", "b": "y", "value": 0.2}
    for low, high, sure in ((0.1, 0.3, True), (-0.1, 0.5, False), (-0.4, -0.1, True), (0.0, 0.4, False)):
        shown = table({**result, "recipes": [], "pairs": [{**row, "low": low, "high": high}]})
        assert ("excludes 0" in shown) == sure, (low, high)


def group(key: int, text: str, correct: bool, logprobs: list[float]) -> RolloutGroup:
    size = len(logprobs)
    rollout = Rollout([1], [2] * size, [True] * size, logprobs, logprobs, "stop", text, 0)
    rollout.reward = Reward(float(correct), correct=correct)
    return RolloutGroup(Prompt(key, text=f"q{key}"), [rollout])


def test_quality_is_greedy_and_variety_and_confidence_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = [group(i, "same words", i < 3, [-0.1]) for i in range(4)]
    half = math.log(0.5)
    sampled = [group(i, f"other words {i}", i == 0, [half, half]) for i in range(4)]
    asked: list[SamplingParams] = []

    def collect(engine: Any, tokenizer: Any, judge: Any, prompts: Any, params: SamplingParams) -> Any:
        asked.append(params)
        return (sampled if params.temperature else greedy), None

    monkeypatch.setattr(module, "collect", collect)
    monkeypatch.setattr(module, "make_engine", lambda *_, **__: None)
    monkeypatch.setattr(module, "make_scorer", lambda task: contextlib.nullcontext())
    monkeypatch.setattr(module, "encode_prompt", lambda tokenizer, prompt: [1])
    policy: Any = SimpleNamespace(model=SimpleNamespace(eval=lambda: None), tokenizer=None)
    prompts = [one.prompt for one in greedy]
    found = measure(policy, None, None, prompts, 9, shown=1)  # type: ignore[arg-type]
    assert sorted((p.temperature, p.max_tokens) for p in asked) == [(0.0, 9), (1.0, 9)]
    assert found["quality"] == [1.0, 1.0, 1.0, 0.0]
    assert found["distinct_1"] == 6 / 12, "other, words, and a number of each"
    assert found["calibration"]["bins"] == [{"count": 4, "confidence": pytest.approx(0.25), "accuracy": 0.25}]
    assert [reply["reply"] for reply in found["replies"]] == ["same words"]


TASK = """
from upslope.tasks.base import Task, chat_prompt, select_prompts


class Letter(Task):
    name = "letter"

    def prompts(self, split, n, *, seed):
        return select_prompts((chat_prompt(f"Say {i}") for i in range(500)), split, n, name=self.name)

    def rewards(self, prompts, completions):
        return [float("a" in text) for text in completions]
"""


def test_every_run_has_its_seed_and_all_are_measured_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the held-out problems, with room for the longest reply that any recipe is trained on."""
    (tmp_path / "letter.py").write_text(TASK)
    head = f'model = "m"\ntask = "{tmp_path / "letter.py"}:Letter"\nseed = 9\n'
    (tmp_path / "sft_a.toml").write_text(f"{head}max_completion_length = 5\n")
    (tmp_path / "grpo_b.toml").write_text(f"{head}max_completion_length = 12\n")
    trained: list[tuple[str, int, int | None]] = []
    seen: list[tuple[tuple[int, ...], int]] = []

    def train(verb: str) -> Any:
        def run(options: Any, *, policy: Any) -> dict[str, Any]:
            trained.append((verb, options.seed, options.max_tokens))
            Path(options.output_dir).mkdir(parents=True)
            return {"stopped": "max_tokens", "steps": 1, "trained_tokens": 1, "seconds": 1.0}

        return run

    def measure(policy: Any, options: Any, task: Any, prompts: Any, longest: int, *, shown: int) -> dict[str, Any]:
        seen.append((tuple(prompt.key for prompt in prompts), longest))
        return measured([1.0] * len(prompts))

    monkeypatch.setattr(module, "load_policy", lambda options: None)
    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "curve", lambda *_: [])
    monkeypatch.setattr(module, "write_report", lambda *_: None)
    for verb in ("sft", "grpo"):
        monkeypatch.setattr(f"upslope.recipes.{verb}.{verb}", train(verb))
    configs = tuple(str(tmp_path / name) for name in ("sft_a.toml", "grpo_b.toml"))
    out = str(tmp_path / "c")
    compare(CompareOptions(configs=configs, seed=3, seeds=2, max_tokens=50, eval_samples=6, output_dir=out))
    assert trained == [(verb, seed, 50) for seed in (3, 4) for verb in ("sft", "grpo")]
    task = module.load_task(f"{tmp_path / 'letter.py'}:Letter")
    held_out = tuple(prompt.key for prompt in task.prompts("eval", 6, seed=0))
    assert seen == [(held_out, 12)] * 5, "the start, and two recipes with two seeds"
