"""The learning benchmark: every case is well formed, verdicts and lines by hand, the page, the command end to end."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks import harness, learning_report
from benchmarks.harness import CASES, ROOT, Outcome, lines_of, load_case, met


def test_every_case_has_its_file_and_every_file_is_a_case_or_a_helper() -> None:
    assert len(set(CASES)) == len(CASES)
    files = {path.stem for path in (ROOT / "benchmarks" / "cases").glob("*.py")}
    assert set(CASES) <= files
    for helper in files - set(CASES) - {"__init__"}:
        text = (ROOT / "benchmarks" / "cases" / f"{helper}.py").read_text(encoding="utf-8")
        assert "\nLEARNERS" not in text, f"{helper} looks like a case, and harness.CASES does not name it"


@pytest.mark.parametrize("name", CASES)
def test_a_case_says_who_learns_what_is_expected_and_from_which_seeds(name: str) -> None:
    case = load_case(name)
    assert name == case.NAME
    assert (case.__doc__ or "").strip()
    assert case.LEARNERS
    assert len(set(case.LEARNERS)) == len(case.LEARNERS)
    assert case.SEEDS
    assert list(case.SEEDS) == sorted(set(case.SEEDS))
    assert set(case.EXPECTED) == set(case.LEARNERS)
    bounds = [(who, metric, bound) for who, metrics in case.EXPECTED.items() for metric, bound in metrics.items()]
    for learner, metric, bound in bounds:
        if bound is not None:
            op, value = bound
            assert op in ("<=", ">="), (learner, metric)
            assert isinstance(value, (int, float)), (learner, metric)
            assert math.isfinite(value), (learner, metric)
    for learner, seeds in getattr(case, "SEEDS_OF", {}).items():
        assert learner in case.LEARNERS
        assert set(seeds) <= set(case.SEEDS)
        assert len(seeds) > 0
    assert callable(case.run)


# Verdicts and lines


@pytest.mark.parametrize(
    ("value", "expected", "verdict"),
    [
        (0.5, (">=", 0.5), True),
        (0.49, (">=", 0.5), False),
        (0.5, ("<=", 0.5), True),
        (0.51, ("<=", 0.5), False),
        (math.inf, ("<=", 0.5), False),
        (math.inf, (">=", 0.5), True),
        (math.nan, (">=", 0.5), False),
        (math.nan, ("<=", 0.5), False),
        (0.5, None, None),
        (math.nan, None, None),
    ],
)
def test_an_expectation_is_met(value: float, expected: harness.Expectation, verdict: bool | None) -> None:
    assert met(value, expected) is verdict


def made_up(**expected: Any) -> Any:
    return SimpleNamespace(NAME="walk", LEARNERS=("ppo",), SEEDS=(0, 1, 2), EXPECTED={"ppo": expected})


def test_lines_are_medians_and_ranges_over_seeds() -> None:
    outcomes = {
        0: Outcome({"gain": 0.3, "kl": 1.0}, 100, 2.0),
        1: Outcome({"gain": 0.1, "kl": 3.0}, 300, 6.004),
        4: Outcome({"gain": 0.7, "kl": 2.0}, 200, 4.006),
    }
    first, second = lines_of(made_up(gain=(">=", 0.25)), "ppo", outcomes, "abc+")
    assert first == {
        **{"case": "walk", "learner": "ppo", "metric": "gain"},
        **{"median": 0.3, "min": 0.1, "max": 0.7, "expected": ">= 0.25", "met": True},
        **{"seeds": [0, 1, 4], "samples": 200, "seconds": 4.01, "commit": "abc+"},
    }
    assert (second["metric"], second["median"], second["expected"], second["met"]) == ("kl", 2.0, None, None)


def test_expected_metrics_come_first_and_each_once() -> None:
    outcomes = {0: Outcome({"b": 1.0, "a": 2.0, "c": 3.0}, 1, 1.0), 1: Outcome({"b": 1.0, "d": 4.0}, 1, 1.0)}
    lines = lines_of(made_up(a=None, c=("<=", 5.0)), "ppo", outcomes, "abc")
    assert [line["metric"] for line in lines] == ["a", "c", "b", "d"]


def test_what_was_not_measured_or_not_reached_is_no_number_and_not_met() -> None:
    expected = {"hit": ("<=", 9.0), "lost": (">=", 0.0), "absent": (">=", 0.0)}
    outcomes = {
        0: Outcome({"hit": math.inf, "lost": 1.0}, 1, 1.0),
        1: Outcome({"hit": math.inf}, 1, 1.0),
        2: Outcome({"hit": 3.0, "lost": 1.0}, 1, 1.0),
    }
    hit, lost, absent = lines_of(made_up(**expected), "ppo", outcomes, "abc")
    assert (hit["median"], hit["min"], hit["max"], hit["met"]) == (None, 3.0, None, False)
    assert (lost["median"], lost["met"]) == (None, False)
    assert (absent["median"], absent["min"], absent["max"], absent["met"]) == (None, None, None, False)
    json.loads(json.dumps([hit, lost, absent], allow_nan=False))


def test_the_median_judges_not_the_worst_seed() -> None:
    outcomes = {seed: Outcome({"gain": gain}, 1, 1.0) for seed, gain in enumerate((0.0, 0.5, 0.6))}
    [line] = lines_of(made_up(gain=(">=", 0.5)), "ppo", outcomes, "abc")
    assert line["met"] is True
    [line] = lines_of(made_up(gain=(">=", 0.55)), "ppo", outcomes, "abc")
    assert line["met"] is False


# The page


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], str]:
    """Writes results (case -> lines and curves of ppo) and returns the page made of them."""
    fake = {name: ModuleType(name, f"What {name} is about.\n\nAnd how.") for name in ("walk", "run")}
    monkeypatch.setattr(learning_report, "CASES", tuple(fake))
    monkeypatch.setattr(learning_report, "load_case", fake.__getitem__)
    monkeypatch.setattr(learning_report, "ROOT", tmp_path)
    monkeypatch.setattr(learning_report, "PAGE", tmp_path / "learning.md")
    monkeypatch.setattr(learning_report, "FIGURES", tmp_path / "figures")
    for module in (harness, learning_report):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")

    def write(results: dict[str, Any]) -> str:
        for name, (lines, curves) in results.items():
            fake[name].NAME, fake[name].LEARNERS = name, ("ppo",)  # type: ignore[attr-defined]
            harness.save(fake[name], "ppo", lines, curves["ppo"])
        assert learning_report.main() == 0
        return (tmp_path / "learning.md").read_text()

    return write


def results(bound: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    curve = [(10.0, 0.5, 0.1), (20.0, 1.0, 0.4)]
    outcomes = {seed: Outcome({"gain": 0.4, "first": math.inf}, 2000, 1.5, curve) for seed in (0, 1)}
    expected = made_up(gain=(">=", bound))
    return lines_of(expected, "ppo", outcomes, "abc"), {"ppo": {str(s): o.curve for s, o in outcomes.items()}}


def test_the_page_shows_results_and_says_what_has_not_run(
    page: Callable[[dict[str, Any]], str], tmp_path: Path
) -> None:
    text = page({"walk": results(0.3)})
    assert "Every expectation was met." in text
    assert "What walk is about." in text
    assert "| ppo | gain | 0.4 [0.4, 0.4] | >= 0.3 | yes | 2,000 | 1.5 |" in text
    assert "| ppo | first | never [never, never] |  |  | 2,000 | 1.5 |" in text
    assert "*Seeds 0, 1; commit abc.*" in text
    assert "Not run yet: `python benchmarks/learning.py --case run`" in text
    shown = [f"learning_walk_{axis}.svg" for axis in ("samples", "seconds")]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == shown
    assert all(f"(figures/{name})" in text for name in shown)
    assert all((tmp_path / "figures" / name).read_text().startswith("<svg") for name in shown)


def test_a_learner_run_again_replaces_its_own_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    case = made_up()
    case.LEARNERS = ("ppo", "grpo")  # type: ignore[attr-defined]

    def kept() -> dict[str, Any]:
        return json.loads((tmp_path / "learning" / f"{case.NAME}.json").read_text())

    harness.save(case, "grpo", [{"learner": "grpo", "median": 1}], {"0": []})
    harness.save(case, "ppo", [{"learner": "ppo", "median": 2}], {"0": []})
    harness.save(case, "grpo", [{"learner": "grpo", "median": 3}], {"0": [[1, 2, 3]]})
    assert [(line["learner"], line["median"]) for line in kept()["lines"]] == [("ppo", 2), ("grpo", 3)]
    assert kept()["curves"] == {"ppo": {"0": []}, "grpo": {"0": [[1, 2, 3]]}}
    case.LEARNERS = ("ppo",)  # type: ignore[attr-defined]
    harness.save(case, "ppo", [{"learner": "ppo", "median": 2}], {"0": []})
    assert {line["learner"] for line in kept()["lines"]} == {"ppo"}, "learners that are gone leave the results too"


def test_the_page_names_what_was_missed_first(page: Callable[[dict[str, Any]], str]) -> None:
    text = page({"walk": results(0.5)})
    assert "Every expectation was met." not in text
    assert "- walk, ppo: gain 0.4, expected >= 0.5" in text
    assert text.index("- walk, ppo") < text.index("## walk")
    assert "| >= 0.5 | **no** |" in text


def test_a_case_without_curves_has_no_figures(page: Callable[[dict[str, Any]], str], tmp_path: Path) -> None:
    lines, _ = results(0.3)
    text = page({"walk": (lines, {"ppo": {"0": []}})})
    assert "![" not in text
    assert list((tmp_path / "figures").iterdir()) == []


# The command


def command(*words: str) -> subprocess.CompletedProcess[str]:
    more = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "benchmarks" / "learning.py")
    return subprocess.run(
        [sys.executable, script, *words], env=os.environ | more, capture_output=True, text=True, timeout=280
    )


def test_an_unknown_learner_is_refused() -> None:
    done = command("--case", "preferences", "--learner", "nobody")
    assert done.returncode == 2
    assert "case preferences has no learner nobody: dpo, cdpo" in done.stderr


@pytest.mark.slow
def test_the_command_end_to_end() -> None:
    kept = harness.RESULTS / "learning" / "enumerable.json"
    before = kept.read_bytes() if kept.is_file() else None
    done = command("--case", "enumerable", "--learner", "reinforce_none", "--seeds", "1", "--json")
    [line] = [json.loads(text) for text in done.stdout.splitlines()]
    assert (line["case"], line["learner"], line["metric"]) == ("enumerable", "reinforce_none", "optimality")
    assert line["seeds"] == [0]
    assert 0.5 < line["median"] == line["min"] == line["max"] < 1.0001
    assert line["expected"] == ">= 0.99"
    assert line["met"] is (line["median"] >= 0.99)
    assert done.returncode == (0 if line["met"] else 1), done.stderr
    assert "enumerable reinforce_none seed 0: optimality" in done.stderr
    assert (kept.read_bytes() if kept.is_file() else None) == before, "a part of a case must not be saved"


def test_the_commit_says_whether_the_code_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of the benchmark itself are no change of the code."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "code.py").write_text("1\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    clean = harness.commit()
    assert len(clean) >= 7
    assert "+" not in clean
    (results / "serve.json").write_text("{}")
    assert harness.commit() == clean
    (tmp_path / "code.py").write_text("2\n")
    assert harness.commit() == f"{clean}+"
