"""Expert iteration: what is kept, where it came from, that it learns, repeats and resumes, and REINFORCE's gradient."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from upslope.build import load_policy
from upslope.errors import ConfigError, DataError, RunError
from upslope.functional.policy_losses import reinforce
from upslope.loop import fingerprint
from upslope.loop.expert_rows import Candidate, row_of, select
from upslope.loop.launch import begin
from upslope.loop.session import train
from upslope.models.files.weights import load as load_weights
from upslope.options import ExpertOptions, GRPOOptions
from upslope.preview.dry_run import run as dry_run
from upslope.recipes.expert import Expert, expert
from upslope.recipes.grpo import grpo
from upslope.runs.folder import Run
from upslope.training.experience import Experience
from upslope.training.step import accumulate
from upslope.types import Prompt, Reward, Rollout

TASK = """
from upslope.tasks.base import Task, chat_prompt, select_prompts
from upslope.types import Message, Reward


class Letter(Task):
    name = "letter"

    def prompts(self, split, n, *, seed):
        return select_prompts((chat_prompt(f"Say {i}", answer="a") for i in range(500)), split, n, name=self.name)

    def rewards(self, prompts, completions):
        return [Reward(float(low(text)), {"low": float(low(text))}, correct=low(text)) for text in completions]


def low(text):
    return bool(text) and ord(text[0]) < 128
"""


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "letter.py"
    path.write_text(TASK)
    return f"{path}:Letter"


def options(tiny: Path, task: str, folder: Path, **changes: Any) -> ExpertOptions:
    common: dict[str, Any] = {
        "model": str(tiny),
        "task": task,
        "output_dir": str(folder),
        "num_train_prompts": 40,
        "num_prompts": 6,
        "num_generations": 6,
        "max_completion_length": 6,
        "truncated": "terminate",
        "train_steps": 3,
        "max_steps": 6,
        "batch_size": 5,
        "eval_samples": 8,
        "eval_every": 0,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "dtype": "float32",
    }
    made = ExpertOptions(**{**common, **changes})
    made.validate()
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if '"eval/' not in line]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_weights(folder / "checkpoints" / "last" / "model", torch.float32)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# Which samples are kept


def candidate(key: int, value: float, text: str, *, correct: bool | None = None, cut: bool = False) -> Candidate:
    reason = "length" if cut else "stop"
    rollout = Rollout([5], [6, 7], [True, True], [0.0] * 2, [0.0] * 2, reason, text, 0)  # type: ignore[arg-type]
    rollout.reward = Reward(value, correct=correct)
    return Candidate(Prompt(key, text="p"), rollout, value)


def kept(candidates: list[Candidate], **changes: Any) -> list[int]:
    chosen = select(candidates, ExpertOptions(**changes))
    return [next(i for i, c in enumerate(candidates) if c is one) for one in chosen]


def test_selection_by_hand() -> None:
    some = [
        candidate(1, 0.2, "a", correct=False),
        candidate(1, 0.9, "b", correct=True),
        candidate(1, 0.9, " b ", correct=True),
        candidate(1, 1.0, "c", correct=True, cut=True),
        candidate(2, 0.5, "b", correct=True),
        candidate(2, 0.7, "d", correct=True),
        candidate(3, 0.1, "e", correct=False),
    ]
    assert kept(some) == [1, 4, 5]
    assert kept(some, dedupe=False) == [1, 2, 4, 5]
    assert kept(some, truncated="terminate") == [1, 3, 4, 5]
    assert kept(some, max_per_prompt=1) == [1, 5]
    assert kept(some, threshold=0.2) == [0, 1, 4, 5]
    assert kept(some, keep="best") == [1, 5, 6]
    assert kept(some, keep="best", threshold=0.5) == [1, 5]
    assert kept(some, keep="top", keep_share=0.4) == [1, 5]  # of five different ones, 2
    assert kept(some, keep="top", keep_share=0.41) == [1, 4, 5]  # rounded up
    many = [candidate(key, 1.0, "a") for key in range(100)]
    assert len(kept(many, keep="top", keep_share=0.07)) == 7  # 0.07 * 100 > 7 in binary


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from("abc"), st.booleans())),
    st.sampled_from(["threshold", "best", "top"]),
    st.integers(1, 3),
)
def test_selection_keeps_its_promises(rows: list[tuple[int, float, str, bool]], keep: Any, most: int) -> None:
    some = [candidate(key, value, text, correct=value > 0, cut=cut) for key, value, text, cut in rows]
    if not some:
        return
    o = ExpertOptions(keep=keep, threshold=0.5, max_per_prompt=most, keep_share=0.5)
    chosen = select(some, o)
    places = [next(i for i, c in enumerate(some) if c is one) for one in chosen]
    assert places == sorted(set(places))
    assert all(c.value >= 0.5 and c.rollout.finish_reason == "stop" for c in chosen)
    per_prompt = [[c for c in chosen if c.prompt.key == key] for key in range(4)]
    assert all(len(own) <= (1 if keep == "best" else most) for own in per_prompt)
    assert all(len({c.rollout.text for c in own}) == len(own) for own in per_prompt)
    if keep == "best":
        for key, own in enumerate(per_prompt):
            fit = [
                c.value for c in some if c.prompt.key == key and c.value >= 0.5 and c.rollout.finish_reason == "stop"
            ]
            assert [c.value for c in own] == ([max(fit)] if fit else [])


def test_no_verdict_and_no_threshold_is_said() -> None:
    with pytest.raises(DataError, match="threshold = NUMBER"):
        kept([candidate(1, 0.5, "a")])


# The gradient


def test_a_step_over_all_kept_samples_is_reinforce_without_baseline(tiny: Path, task: str, tmp_path: Path) -> None:
    o = options(tiny, task, tmp_path / "run", normalizer="sample", dedupe=False, max_per_prompt=100)
    learner = Expert(o, load_policy(o))
    model = learner.policy.model
    groups, _ = learner.sampler.sample(0)
    model.double()
    experience = Experience.of(groups)
    rewards = torch.tensor([r.reward.value for r in experience.rollouts], dtype=torch.float64)
    assert 0 < rewards.sum() < len(rewards)
    # REINFORCE: -1/n sum_i R_i sum_t log pi, over all n samples
    experience.advantages = experience.per_sequence(rewards)
    experience.weight = torch.full((experience.num_trained,), 1 / len(rewards), dtype=torch.float64)
    batches, _ = experience.batches(range(experience.size), 10_000)
    accumulate(model, batches, lambda b, out: (reinforce(out.logp_N, b.fields["advantages"]), {}))
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    # Expert iteration: the likelihood of those with R = 1, whatever the micro-batches
    candidates = [Candidate(groups[g].prompt, r, float(r.reward.value)) for g, r in zip(
        experience.group_B, experience.rollouts, strict=True
    )]  # fmt: skip
    chosen = select(candidates, o)
    assert len(chosen) == rewards.sum()
    learner.acceptance = len(chosen) / len(candidates)
    rows = [row_of(c, 1) for c in chosen]
    parts = learner._batches(rows, len(rows), sum(sum(row.example.mask) for row in rows))
    for part in parts:
        part.fields["weight"] = part.fields["weight"].double()
    accumulate(model, parts, learner.likelihood)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-6, atol=1e-9)


# Whole runs


def test_it_learns_and_reports_quality_and_diversity_per_round(tiny: Path, task: str, tmp_path: Path) -> None:
    o = options(tiny, task, tmp_path / "run", num_rounds=4, train_steps=8, batch_size=16, learning_rate=1e-2)
    summary = expert(o)
    assert summary["steps"] == 32
    rounds = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "expert/kept" in line]
    assert [line["round"] for line in rounds] == [1, 2, 3, 4]
    assert rounds[-1]["reward"] > rounds[0]["reward"] + 0.2
    for line in rounds:
        assert line["expert/reward_kept"] == 1.0
        assert line["accuracy"] == line["reward"] == line["expert/reward_all"]
        for name in ("distinct_1", "distinct_2", "unique_share", "self_bleu"):
            assert 0 <= line[f"expert/kept/{name}"] <= 1
            assert 0 <= line[f"expert/all/{name}"] <= 1


def test_every_training_row_has_an_origin(tiny: Path, task: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "yes"}) + "\n" for i in range(7)))
    o = options(tiny, task, tmp_path / "run", mix_data=str(corpus), mix_ratio=0.3, batch_size=8)
    seen = watched(o)
    for round_ in (1, 2):
        rows = lines(tmp_path / "run" / f"samples_round_{round_}.jsonl")
        samples = [row for row in rows if row["source"] == "sample"]
        mixed = [row for row in rows if row["source"] == "corpus"]
        assert len(mixed) == int(3 * 8 * 0.3)
        assert all(row["where"].startswith(str(corpus)) for row in mixed)
        assert all(row["reward"] == 1.0 for row in samples)
        assert all(row["round"] == round_ for row in rows)
        with Run.open(tmp_path / "run", read_only=True) as run:
            for row in samples:
                at = {"step": 3 * round_ - 2, "prompt_key": row["prompt_key"], "sample": row["sample"]}
                (found,) = run.store.rollouts(split="train", **at)
                assert (found.completion, found.reward, found.advantage) == (row["completion"], 1.0, 1.0)
        # what was trained on is what the file says, and 8 x 0.3 = 2.4 rows of a batch are 2, 2, 3
        known = {tuple(row["tokens"]) for row in rows}
        steps = seen[3 * (round_ - 1) : 3 * round_]
        assert all(tuple(tokens) in known for batch in steps for tokens, _ in batch)
        assert [sum(not own for _, own in batch) for batch in steps] == [2, 2, 3]


def watched(o: ExpertOptions) -> list[list[tuple[list[int], bool]]]:
    """Run, and return the (tokens, is a sample) of every step's batch."""
    seen: list[list[tuple[list[int], bool]]] = []

    class Watched(Expert):
        def _batches(self, rows: Any, new: int, trained: int) -> Any:
            seen.append([(row.example.tokens, i < new) for i, row in enumerate(rows)])
            return super()._batches(rows, new, trained)

    learner = Watched(o, load_policy(o))
    try:
        with begin(learner.options) as begun:
            train("expert", learner.options, learner, begun)
    finally:
        learner.close()
    return seen


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"restart": True},
        {"mix": True, "mix_ratio": 0.4, "keep": "top", "normalizer": "sample"},
        {"lora_rank": 4, "restart": True},
    ],
    ids=["raft", "rest-em", "mixed", "adapters"],
)
def test_repeats_and_resumes_bit_for_bit(change: dict[str, Any], tiny: Path, task: str, tmp_path: Path) -> None:
    change = dict(change)
    if change.pop("mix", False):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(5)))
        change["mix_data"] = str(tmp_path / "rows.jsonl")
    runs = ["whole", "resumed-4"]
    if not change or "mix_data" in change:
        runs += ["again", "resumed-3"]
    for run in runs:  # interrupted inside the second round, or at its edge
        _, _, stop = run.partition("-")
        if stop:
            expert(options(tiny, task, tmp_path / run, max_steps=int(stop), **change))
        expert(options(tiny, task, tmp_path / run, resume=bool(stop), **change))
    name = "adapter_model.safetensors" if "lora_rank" in change else "model.safetensors"
    contents = {(tmp_path / run / "checkpoints" / "last" / "model" / name).read_bytes() for run in runs}
    assert len(contents) == 1
    for file in ("samples_round_1.jsonl", "samples_round_2.jsonl"):
        assert len({(tmp_path / run / file).read_bytes() for run in runs}) == 1


def test_a_changed_file_of_rows_stops_the_resume(tiny: Path, task: str, tmp_path: Path) -> None:
    expert(options(tiny, task, tmp_path / "run", max_steps=4))
    path = tmp_path / "run" / "samples_round_2.jsonl"
    state = json.loads(next((tmp_path / "run/checkpoints/last").glob("*state*.json")).read_text())
    assert hashlib.sha256(path.read_bytes()).hexdigest() in json.dumps(state)
    path.write_text(path.read_text() + "\n")
    with pytest.raises(RunError, match=r"samples_round_2\.jsonl: has changed"):
        expert(options(tiny, task, tmp_path / "run", resume=True))
    path.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        expert(options(tiny, task, tmp_path / "run", resume=True))


def test_a_resume_knows_the_corpus_by_its_rows(tiny: Path, task: str, tmp_path: Path) -> None:
    """A hub id has no file to compare."""
    digests = []
    for last in ("c", "d", "c"):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("aa", "bb", last)))
        o = options(tiny, task, tmp_path / "run", mix_data=str(tmp_path / "rows.jsonl"), mix_ratio=0.4)
        with closing(Expert(o, load_policy(o))) as learner:
            digests.append(fingerprint.of_learner(learner)[fingerprint.ROWS])
    assert digests[0] == digests[2] != digests[1]


def test_restart_trains_every_round_from_the_start_model(tiny: Path, task: str, tmp_path: Path) -> None:
    o = options(tiny, task, tmp_path / "run", restart=True, lr_scheduler_type="linear", learning_rate=0.0)
    learner = Expert(o, load_policy(o))
    start = {name: x.clone() for name, x in learner.optimizer.weights().items()}
    learner.step(0)
    for x in learner.optimizer.masters.values():
        x.data.add_(1.0)
    learner.optimizer.refresh()
    sampled = learner.engine.version
    learner.begin_round(3, 1)
    assert equal(start, learner.optimizer.weights())
    assert learner.optimizer.state() == {}
    assert learner.engine.version > sampled
    learner.options = options(tiny, task, tmp_path / "run", restart=True, lr_scheduler_type="linear", learning_rate=1.0)
    assert [learner.learning_rate(step) for step in range(6)] == pytest.approx([1, 2 / 3, 1 / 3] * 2)
    learner.close()


def test_from_a_finished_run(tiny: Path, task: str, tmp_path: Path) -> None:
    common = {"model": str(tiny), "task": task, "dtype": "float32", "learning_rate": 1e-3, "max_completion_length": 6}
    common |= {"num_train_prompts": 40, "num_prompts": 4, "num_generations": 4, "max_steps": 3, "eval_samples": 0}
    grpo(GRPOOptions(**common, output_dir=str(tmp_path / "grpo")))
    o = options(tiny, task, tmp_path / "run", from_run=str(tmp_path / "grpo"), num_rounds=1)
    summary = expert(o)
    assert summary["steps"] == 3
    line = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert line["expert/candidates"] == 48
    with Run.open(tmp_path / "grpo", read_only=True) as run, Run.open(tmp_path / "run", read_only=True) as ours:
        rows = lines(tmp_path / "run" / "samples_round_1.jsonl")
        assert rows
        for row in rows:
            stored = run.store.rollout(row["rollout"])
            assert (stored.row.step, stored.row.sample) == (row["step"], row["sample"])
            assert row["tokens"] == stored.arrays["prompt_tokens"] + stored.arrays["tokens"]
        assert ours.store.rollout_steps("train") == []


def test_a_run_of_another_tokenizer_is_refused(tiny: Path, task: str, tmp_path: Path) -> None:
    expert(options(tiny, task, tmp_path / "first", max_steps=1))
    with Run.open(tmp_path / "first") as run:
        run.store._connection.execute("UPDATE rollouts SET completion = 'something else'")
    o = options(tiny, task, tmp_path / "second", from_run=str(tmp_path / "first"))
    with pytest.raises(DataError, match="same tokenizer"):
        expert(o)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"threshold": 2.0}, DataError, "none of 36 samples .*best reward 1"),
        ({"mix_ratio": 0.5}, ConfigError, "mix_data and mix_ratio"),
        ({"mix_data": "x.jsonl"}, ConfigError, "mix_data and mix_ratio"),
        ({"truncated": "bootstrap"}, ConfigError, "critic"),
        ({"rollout_correction": "token"}, ConfigError, "rollout_correction"),
        ({"rollout_lag": 1}, ConfigError, "rollout_lag"),
        ({"keep_share": 0.0}, ConfigError, "keep_share"),
        ({"top_p": 0.0}, ConfigError, "top_p"),
        ({"from_run": "{tmp}/absent"}, RunError, "absent"),
        ({"mix_data": "{tmp}/absent.jsonl", "mix_ratio": 0.5}, DataError, "absent.jsonl"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_input_is_one_clear_line(
    change: dict[str, Any], error: type[Exception], said: str, tiny: Path, task: str, tmp_path: Path
) -> None:
    change = {k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(error, match=said) as caught:
        expert(options(tiny, task, tmp_path / "run", **change))
    assert "\n" not in str(caught.value)


def test_filtered_sampling_needs_no_correction(tiny: Path, task: str, tmp_path: Path) -> None:
    assert expert(options(tiny, task, tmp_path / "run", top_k=50, top_p=0.9, max_steps=1))["steps"] == 1


def test_dry_run(tiny: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(options(tiny, task, tmp_path / "run", json=True, num_rounds=2, train_steps=7))
    said = json.loads(capsys.readouterr().out)
    assert said["plan"]["optimizer_steps"] == 14
    assert said["prediction"]["step_seconds"] > 0
    assert not (tmp_path / "run").exists()
