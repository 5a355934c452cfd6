"""The speed comparison without its workers: ratios, equal work, tuning, pairs in turn, the stored report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import environments, machine, vs_trl
from benchmarks.speed import protocol, report, runner, work


def result(*seconds: float, memory: float = 2.0, length: int = 96, rollout: float = 1.0) -> dict[str, Any]:
    """A worker's answer: steps of so many seconds, 64 completions each."""
    steps = [
        {
            "seconds": s,
            "rollout": rollout,
            "reward": 0.0,
            "update": s - rollout,
            "peak_memory_gb": memory,
            "prompt_tokens": 100,
            "lengths": [length] * 64,
        }
        for s in seconds
    ]
    return {"steps": steps, "versions": {"torch": "2"}, "threads": 2}


def case(*pairs: tuple[dict[str, Any], dict[str, Any]], kind: str = "grpo") -> dict[str, Any]:
    """A stored case with one step of warm-up."""
    return {
        "peer": "trl==1",
        "peer_options": {"bf16": True},
        "kind": kind,
        "machine": {"commit": "abc", "dirty": False},
        "threads": 2,
        "warmup": 1,
        "pairs": [{"ours": ours, "theirs": theirs} for ours, theirs in pairs],
    }


# Ratios


def test_a_speed_ratio_is_theirs_over_ours_without_the_warm_up() -> None:
    pair = {"ours": result(100.0, 2.0, 4.0, 30.0), "theirs": result(1.0, 20.0, 20.0, 26.0)}
    assert report.ratio(pair, "seconds", 1) == 20.0 / 4.0


def test_the_memory_ratio_is_ours_over_theirs_at_the_end_of_the_measured_steps() -> None:
    ours, theirs = result(1.0, 1.0, memory=3.0), result(1.0, 1.0, memory=4.0)
    ours["steps"][-1]["peak_memory_gb"] = 3.5
    assert report.ratio({"ours": ours, "theirs": theirs}, "peak_memory_gb", 1) == 3.5 / 4.0


def test_ratios_are_paired_and_their_median_and_range_taken_over_the_pairs() -> None:
    stored = case(
        (result(9.0, 1.0), result(9.0, 6.0)),
        (result(9.0, 2.0), result(9.0, 8.0)),
        (result(9.0, 4.0), result(9.0, 40.0)),
    )
    assert report.case_ratio(stored, "seconds") == {"median": 6.0, "min": 4.0, "max": 10.0}


def test_a_case_that_was_not_run_is_null() -> None:
    found = report.ratios({"fixed": case((result(9.0, 2.0), result(9.0, 12.0, memory=4.0)))})
    assert list(found) == [
        "step_vs_tuned",
        "step_vs_default",
        "rollout_vs_tuned",
        "update_vs_tuned",
        "peak_memory_vs_tuned",
        "ppo_step_vs_trl_1_12",
        "rollout_vs_vllm",
    ]
    assert found["step_vs_tuned"] == {"median": 6.0, "min": 6.0, "max": 6.0}
    assert found["update_vs_tuned"] == {"median": 11.0, "min": 11.0, "max": 11.0}
    assert found["peak_memory_vs_tuned"] == {"median": 0.5, "min": 0.5, "max": 0.5}
    assert [found[name] for name in ("step_vs_default", "ppo_step_vs_trl_1_12", "rollout_vs_vllm")] == [None] * 3


def test_a_result_of_warm_up_alone_has_no_value() -> None:
    with pytest.raises(ValueError, match="none after 1"):
        report.value(result(1.0), "seconds", 1)


def test_lengths_and_tokens_per_second() -> None:
    made = result(9.0, 4.0)
    made["steps"][1]["lengths"] = [1, 2, 3, 4, 5]
    assert report.lengths([made], 1) == {"mean": 3.0, "q1": 2.0, "median": 3.0, "q3": 4.0}
    assert report.tokens_per_second(made, "seconds", 1) == 15 / 4


def test_a_case_report_tells_both_sides_and_why_there_is_no_figure() -> None:
    line = report.case_report("fixed", case((result(9.0, 2.0), result(9.0, 12.0))))
    assert line["ours"]["seconds"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert line["theirs"]["tokens_per_second"]["median"] == 512.0
    assert set(line["ratios"]) == {"seconds", "rollout", "update", "peak_memory_gb"}
    assert "6x [6, 6]" in report.table(line)
    rollout = report.case_report("vllm", case((result(9.0, 2.0), result(9.0, 12.0)), kind="rollout"))
    assert set(rollout["ratios"]) == {"rollout"}
    missing = report.case_report("vllm", {**case(), "missing": "no wheel"})
    assert missing == {"case": "vllm", "peer": "trl==1", "missing": "no wheel"}
    assert "no figure (no wheel)" in report.table(missing)


# Equal work

ASKED = {"warmup": 1, "steps": 1, "threads": 2, "num_prompts": 8, "num_generations": 8, "fixed": True} | {
    "max_completion_length": 96
}


def _other_prompts(theirs: dict[str, Any]) -> None:
    theirs["steps"][0]["prompt_tokens"] = 101


def _short_completion(theirs: dict[str, Any]) -> None:
    theirs["steps"][1]["lengths"][3] = 95


def _fewer_completions(theirs: dict[str, Any]) -> None:
    del theirs["steps"][1]["lengths"][0]


def _threads(theirs: dict[str, Any]) -> None:
    theirs["threads"] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_prompts, "not the same"),
        (_short_completion, "not all of them full"),
        (_fewer_completions, "63 completions"),
        (_threads, "1 threads, 2 were asked for"),
    ],
)
def test_unequal_work_is_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    ours, theirs = result(1.0, 1.0), result(1.0, 1.0)
    runner.check_equal_work(ours, theirs, ASKED)
    change(theirs)
    with pytest.raises(ValueError, match=message):
        runner.check_equal_work(ours, theirs, ASKED)


def test_natural_lengths_may_differ() -> None:
    runner.check_equal_work(result(1.0, 1.0, length=80), result(1.0, 1.0), {**ASKED, "fixed": False})


def test_prompts_differ_and_the_reward_is_the_mean_word_length() -> None:
    assert len(set(work.prompts(4096))) == 4096
    assert work.prompts(8) == work.prompts(64)[:8]
    with pytest.raises(ValueError, match="4096"):
        work.prompts(4097)
    assert work.reward(" a bcd ") == 2.0
    assert work.reward("") == 0.0
    rounds = work.random_prompts(3, 48, 1000, seed=1)
    assert [len(p) for p in rounds] == [48] * 3
    assert rounds != work.random_prompts(3, 48, 1000, seed=2)


def test_a_step_lasts_from_the_end_of_the_one_before_and_its_update_is_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([0.0, 10.0, 11.0, 14.0, 17.0, 20.0])
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: next(now))
    steps = protocol.Steps()
    steps.begin()  # 10
    assert steps.timed("rollout", lambda x: x + 1)(1) == 2  # 11 to 14
    steps.add("reward", 0.5)
    steps.note(prompt_tokens=5, lengths=[1])
    steps.end()  # 17
    steps.end()  # 20
    first, second = steps.made
    assert (first["seconds"], first["rollout"], first["reward"], first["update"]) == (7.0, 3.0, 0.5, 3.5)
    assert (first["prompt_tokens"], first["lengths"]) == (5, [1])
    assert (second["seconds"], second["rollout"], second["update"]) == (3.0, 0.0, 3.0)


# Tuning and running


def test_the_best_candidate_is_the_fastest_and_among_equals_the_smallest() -> None:
    looks = [
        {"options": 1, "seconds": 10.0, "peak_memory_gb": 9.0},
        {"options": 2, "seconds": 10.2, "peak_memory_gb": 5.0},
        {"options": 3, "seconds": 11.0, "peak_memory_gb": 1.0},
        {"options": 4, "seconds": 1.0, "peak_memory_gb": 1.0, "error": "completions of [3] tokens"},
    ]
    assert report.best(looks)["options"] == 2
    with pytest.raises(RuntimeError, match="completions of"):
        report.best(looks[3:])


@pytest.fixture
def invoked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Workers replaced: the calls made, in order; the peer is slower in float32 and cannot batch continuously."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def answer(settings: dict[str, Any], seconds: float) -> dict[str, Any]:
        made = result(*[seconds] * (settings["warmup"] + settings["steps"]), length=settings["max_completion_length"])
        for step in made["steps"]:
            step["lengths"] = step["lengths"][: settings["num_prompts"] * settings["num_generations"]]
        return {**made, "threads": settings["threads"]}

    def ours(settings: dict[str, Any]) -> dict[str, Any]:
        calls.append(("ours", settings))
        return answer(settings, 2.0)

    def peer(name: str, settings: dict[str, Any], *, limit_s: float | None = None) -> dict[str, Any]:
        calls.append((name, settings))
        options = settings["options"]
        if options.get("use_transformers_continuous_batching"):
            raise runner.WorkerFailed("trl_grpo_worker", "not on a CPU")
        return answer(settings, 12.0 if options.get("bf16") else 20.0)

    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(runner, "run_ours", ours)
    monkeypatch.setattr(runner, "run_peer", peer)
    monkeypatch.setattr(runner, "policy_folder", lambda *, quick: tmp_path)
    monkeypatch.setattr(runner, "reward_folder", lambda policy: tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    return calls


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    """The JSON lines of one invocation."""
    monkeypatch.setattr("sys.argv", ["vs_trl.py", "--json", "--threads", "2", *words])
    assert vs_trl.main() == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_pairs_run_in_turn_against_the_best_candidate_and_the_report_can_be_made_again(
    invoked: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = command(monkeypatch, capsys, "--only", "fixed")
    assert [who for who, _ in invoked] == ["trl"] * 5 + ["ours", "trl"] * 3
    chosen = {"gradient_checkpointing": False, "bf16": True}
    assert all(asked["options"] == chosen for who, asked in invoked[5:] if who == "trl")
    assert lines[-1]["ratios"]["step_vs_tuned"] == {"median": 6.0, "min": 6.0, "max": 6.0}
    assert lines[-1]["ratios"]["step_vs_default"] is None
    stored = machine.load("vs_trl")
    assert stored is not None
    assert len(stored["cases"]["fixed"]["pairs"]) == 3
    assert [("error" in look) for look in stored["looks"]["trl"]["looks"]] == [False, False, False, True, False]
    assert stored["cases"]["fixed"]["machine"]["cores"] == machine.cores()
    assert stored["ratios"] == lines[-1]["ratios"]

    invoked.clear()
    assert command(monkeypatch, capsys, "--report", "--only", "fixed") == lines
    assert invoked == []

    lines = command(monkeypatch, capsys, "--only", "default", "--pairs", "1")
    assert [who for who, _ in invoked] == ["ours", "trl"]
    assert invoked[1][1]["options"] == {}
    assert lines[-1]["ratios"]["step_vs_default"] == {"median": 10.0, "min": 10.0, "max": 10.0}
    assert lines[-1]["ratios"]["step_vs_tuned"] is None
    both = command(monkeypatch, capsys, "--report")[-1]["ratios"]
    assert both["step_vs_tuned"]["median"] == 6.0
    assert both["step_vs_default"]["median"] == 10.0

    invoked.clear()
    command(monkeypatch, capsys, "--only", "natural", "--pairs", "1")
    assert [who for who, _ in invoked] == ["ours", "trl"], "the choice is stored"
    assert not invoked[0][1]["fixed"]


def test_both_sides_of_a_rollout_get_the_same_new_prompts_each_round(
    invoked: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, capsys, "--only", "vllm", "--pairs", "1", "--steps", "2")
    ours, theirs = (asked["prompts"] for _, asked in invoked[-2:])
    assert ours == theirs
    assert len(ours) == 3
    assert ours[0] != ours[1]
    assert {len(prompt) for prompt in ours[0]} == {48}


def test_a_vllm_that_does_not_start_is_reported_as_missing_and_any_other_failure_is_raised(
    invoked: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(name: str, settings: dict[str, Any], *, limit_s: float | None = None) -> dict[str, Any]:
        raise runner.WorkerFailed(name, "no such instruction")

    monkeypatch.setattr(runner, "run_peer", fails)
    lines = command(monkeypatch, capsys, "--only", "vllm")
    assert "no such instruction" in lines[0]["missing"]
    assert lines[-1]["ratios"]["rollout_vs_vllm"] is None
    with pytest.raises(RuntimeError, match="no such instruction"):
        command(monkeypatch, capsys, "--only", "ppo")


def test_a_worker_that_fails_or_takes_too_long_says_so() -> None:
    settings = {"threads": 1}
    with pytest.raises(runner.WorkerFailed, match="No module named") as failed:
        runner._run(Path(sys.executable), "no_worker", settings, None)
    assert failed.value.module == "benchmarks.speed.no_worker"
    with pytest.raises(runner.WorkerFailed, match="stopped after 0"):
        runner._run(Path(sys.executable), "no_worker", settings, 0.001)


# The machine and the environments


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("AMD EPYC", 2, "amd-epyc-2c"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", 8, "intel-xeon-8c"),
        ("AMD EPYC 7B13 64-Core Processor", 4, "amd-epyc-7b13-64-core-4c"),
    ],
)
def test_a_machine_has_a_folder_name(name: str, count: int, expected: str) -> None:
    assert machine.slug(name, count) == expected


def test_results_are_stored_compactly_and_read_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    data = {"lengths": [1, 2, 3], "deep": [{"x": [0.5], "y": "a [ b,\n c ]"}], "empty": []}
    path = machine.save("some", data)
    assert path == machine.results_folder() / "some.json"
    assert machine.load("some") == data
    assert '"lengths": [1, 2, 3]' in path.read_text()
    assert machine.load("other") is None
    with pytest.raises(ValueError, match="JSON"):
        machine.save("some", {"x": float("nan")})
    assert machine.load("some") == data
    assert machine.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_an_environment_loses_what_must_go_and_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def fake(words: list[str], *, check: bool) -> None:
        assert check
        commands.append(words)
        if "venv" in words:
            Path(words[-1]).mkdir(parents=True)

    monkeypatch.setenv("UPSLOPE_BENCH_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", fake)
    plain = environments.peer_python("peer", ["a==1"])
    assert commands[-1][-2:] == ["--quiet", "a==1"]
    less = environments.peer_python("peer", ["a==1"], remove=("b", "c"))
    assert commands[-1][2:] == ["pip", "uninstall", "--quiet", "--yes", "b", "c"]
    assert plain.parent.parent.parent == less.parent.parent.parent == tmp_path
    assert plain != less
    made = len(commands)
    assert environments.peer_python("peer", ["a==1"], remove=("b", "c")) == less
    assert len(commands) == made
