"""upslope classify: the objectives' gradients, learning, repeat and resume, adapters, test scored once, bad input."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoder_kit import encoder_folder
from safetensors.torch import load_file

from upslope.cli import main
from upslope.errors import ConfigError, DataError
from upslope.loop.encoder import Objective
from upslope.models.encoder.items import groups_of, item_logits, load_start, padded_batch
from upslope.options import ClassifyOptions
from upslope.recipes.classify import Classify, classify, make_learner

OBJECTIVES = ("cross_entropy", "policy_gradient", "policy_gradient_sampled")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("bert") / "m")


def table(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


FILLERS = ["the film was", "we saw", "in the visit", "the", "and we was", "film and visit", "was in", "we"]


def opinions(copies: int = 3) -> list[tuple[str, str]]:
    """The word good or bad decides, wherever it stands."""
    out = []
    for i in range(copies):
        for filler, (word, label) in itertools.product(FILLERS, [("good", "up"), ("bad", "down")]):
            words = [*filler.split(), *["and"] * i]
            words.insert(i % (len(words) + 1), word)
            out.append((" ".join(words), label))
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table(tmp_path_factory.mktemp("data") / "train.csv", opinions())


def options(model: Path, rows: Path, **more: Any) -> ClassifyOptions:
    shared: dict[str, Any] = {
        **{"model": str(model), "data": str(rows)},
        **{"dtype": "float32", "batch_size": 8, "max_length": 32},
        **{"eval_share": 0.25, "lr_scheduler_type": "constant", "learning_rate": 1e-3, "eval_every": 0},
    }
    return ClassifyOptions(**{**shared, **more})


# The objectives

SEED = torch.Generator().manual_seed(5)
LOGITS = torch.randn(3, 4, dtype=torch.float64, generator=SEED)
REWARDS = torch.randn(4, 4, dtype=torch.float64, generator=SEED)
TARGETS = torch.tensor([2, 0, 2])


def gradient(objective: Objective, logits: torch.Tensor = LOGITS, **where: Any) -> torch.Tensor:
    z = logits.clone().requires_grad_()
    n = len(z)
    given = {"step": 0, "rows_N": list(range(n)), "counters_N": [0] * n, **where}
    objective(z, TARGETS.repeat(n // 3), **given).sum().backward()
    assert z.grad is not None
    return z.grad


def enumerated(num_samples: int, baseline: str) -> torch.Tensor:
    """The expected gradient of the sampled objective, over every tuple of labels with its probability."""
    objective = Objective("policy_gradient_sampled", REWARDS, num_samples, baseline)
    z = LOGITS.clone().requires_grad_()
    logp = z.log_softmax(-1)
    rewards = REWARDS[TARGETS]
    total = torch.zeros(())
    for labels in itertools.product(range(4), repeat=num_samples):
        chosen = torch.tensor(labels).repeat(3, 1)
        probability = logp.detach().gather(1, chosen).sum(1).exp()
        total = total + (probability * objective.of_samples(logp, rewards, chosen)).sum()
    total.backward()
    assert z.grad is not None
    return z.grad


@pytest.mark.parametrize(
    ("num_samples", "baseline", "factor"),
    [(1, "none", 1.0), (3, "none", 1.0), (3, "leave_one_out", 1.0), (3, "mean", 2 / 3)],
)
def test_the_sampled_gradient_is_the_exact_one_in_expectation(num_samples: int, baseline: str, factor: float) -> None:
    exact = gradient(Objective("policy_gradient", REWARDS))
    assert torch.allclose(enumerated(num_samples, baseline), factor * exact, rtol=0, atol=1e-10)


def test_the_exact_gradient_by_its_formula_and_against_cross_entropy() -> None:
    p = LOGITS.softmax(-1)
    r = REWARDS[TARGETS]
    by_hand = -p * (r - (p * r).sum(-1, keepdim=True))
    assert torch.allclose(gradient(Objective("policy_gradient", REWARDS)), by_hand, rtol=0, atol=1e-12)
    zero_one = torch.eye(4, dtype=torch.float64)
    right = p.gather(1, TARGETS[:, None])
    expected = right * gradient(Objective("cross_entropy", zero_one))
    assert torch.allclose(gradient(Objective("policy_gradient", zero_one)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_drawn_samples_average_to_the_exact_gradient(baseline: str) -> None:
    copies, k = 1500, 5
    many = LOGITS.repeat(copies, 1)
    sampled = gradient(Objective("policy_gradient_sampled", REWARDS, k, baseline, seed=3), many)
    per_copy = sampled.view(copies, 3, 4)
    exact = gradient(Objective("policy_gradient", REWARDS))
    error = per_copy.std(0) / copies**0.5
    assert bool(((per_copy.mean(0) - exact).abs() < 4.5 * error).all())
    assert float(error.max()) < 0.03


def test_a_sample_depends_on_its_address_and_not_on_its_company() -> None:
    objective = Objective("policy_gradient_sampled", REWARDS, num_samples=6, seed=1)
    logp = torch.zeros(3, 4).log_softmax(-1)
    together = objective.samples(logp, 7, [4, 9, 9], [0, 0, 1])
    assert torch.equal(objective.samples(logp[:1], 7, [9], [1])[0], together[2])
    assert torch.equal(objective.samples(logp, 7, [9, 4, 9], [1, 0, 0]), together[[2, 0, 1]])
    different = [
        objective.samples(logp, 8, [4, 9, 9], [0, 0, 1]),
        Objective("policy_gradient_sampled", REWARDS, 6, seed=2).samples(logp, 7, [4, 9, 9], [0, 0, 1]),
    ]
    assert not any(torch.equal(x, together) for x in different)


def test_label_smoothing_by_hand() -> None:
    z = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    logp = z.log_softmax(-1)[0]
    found = Objective("cross_entropy", torch.eye(3), label_smoothing=0.3)(
        z, torch.tensor([0]), step=0, rows_N=[0], counters_N=[0]
    )
    assert float(found) == pytest.approx(float(-0.7 * logp[0] - 0.1 * logp.sum()))


# One update


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_update_does_not_depend_on_micro_batches(objective: str, bert: Path, data: Path) -> None:
    weights = []
    for budget in (30, 4096):
        learner = make_learner(options(bert, data, objective=objective, micro_batch_tokens=budget, max_steps=1))
        result = learner.step(0)
        weights.append((learner.optimizer._adamw.state_dict()["state"], result.metrics["grad_norm"], result.metrics))
    for state, norm, metrics in weights[:-1]:
        assert norm == pytest.approx(weights[-1][1], rel=1e-5)
        assert metrics["loss"] == pytest.approx(weights[-1][2]["loss"], rel=1e-5)
        for i, entry in state.items():
            assert torch.allclose(entry["exp_avg"], weights[-1][0][i]["exp_avg"], rtol=1e-4, atol=1e-7)


def test_the_loss_is_a_mean_over_the_rows_of_the_step(bert: Path, data: Path) -> None:
    learner = make_learner(options(bert, data))
    read = learner.data
    first = [learner.order.at(i) for i in range(8)]
    inputs = [read.train[i] for i in first]
    with torch.no_grad():
        logits = torch.cat([item_logits(learner.encoder, padded_batch([x], learner.encoder, 0)) for x in inputs])
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([x.targets[0] for x in inputs]))
    assert learner.step(0).metrics["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_groups_hold_every_input_once_and_stay_under_the_budget() -> None:
    lengths = [3, 9, 2, 9, 30, 1, 5]
    groups = groups_of(lengths, 20)
    assert sorted(itertools.chain(*groups)) == list(range(7))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 20 for g in groups)


# Whole runs


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rank", [0, 8], ids=["full", "lora"])
def test_it_learns(objective: str, rank: int, bert: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "many.csv", opinions(6))
    o = options(
        bert,
        data,
        objective=objective,
        lora_rank=rank,
        num_samples=8,
        max_steps=80,
        learning_rate=2e-3 if rank else 1e-3,
        output_dir=str(tmp_path / "run"),
    )
    summary = classify(o)
    assert summary["dev"]["accuracy"]["value"] >= 0.9
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"eval/' not in x]
    assert lines[-1]["reward"] > lines[0]["reward"]


@pytest.mark.parametrize(("targets", "adapted"), [((), 6), (("query", "value"), 2), (("all-linear",), 6)])
def test_adapters_go_on_the_layers_that_were_named(
    targets: tuple[str, ...], adapted: int, bert: Path, tmp_path: Path
) -> None:
    """BERT's block has six linear layers: query, key, value, two of name dense and the attention's dense."""
    o = options(bert, table(tmp_path / "some.csv", opinions(2)), lora_rank=2, lora_target_modules=targets)
    encoder = load_start(o, "classify", ("bad", "good")).encoder
    layers = {
        name.split(".lora_")[0].partition(".layer.")[2] for name, _ in encoder.named_parameters() if "lora_" in name
    }
    blocks = {layer.partition(".")[0] for layer in layers}
    assert len(layers) == adapted * len(blocks)


def run_files(folder: Path) -> dict[str, Any]:
    last = (folder / "checkpoints/last").resolve()
    tensors = {
        f"{path.relative_to(last)}:{name}": tensor
        for path in sorted(last.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines() if '"eval/' not in x]
    kept = [{k: v for k, v in line.items() if k != "time"} for line in lines]
    return {"tensors": tensors, "metrics": kept, "report": json.loads((folder / "report.json").read_text())}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name
    assert found["metrics"] == expected["metrics"]
    assert found["report"] == expected["report"]


@pytest.mark.parametrize(
    ("rank", "objective", "dtype"),
    [(0, "cross_entropy", "float32"), (4, "policy_gradient_sampled", "float32"), (4, "policy_gradient", "bfloat16")],
)
def test_runs_repeat_and_resume_bit_for_bit(
    rank: int, objective: str, dtype: str, bert: Path, data: Path, tmp_path: Path
) -> None:
    def go(name: str, steps: int, resume: bool = False) -> Path:
        classify(
            options(
                bert,
                data,
                objective=objective,
                dtype=dtype,
                lora_rank=rank,
                max_steps=steps,
                eval_every=3,
                resume=resume,
                output_dir=str(tmp_path / name),
            )
        )
        return tmp_path / name

    expected = run_files(go("whole", 6))
    assert any(name.startswith("weights") for name in expected["tensors"]) == bool(rank)
    assert_same(run_files(go("again", 6)), expected)
    go("parts", 3)
    assert_same(run_files(go("parts", 6, resume=True)), expected)


def test_the_best_checkpoint_on_dev_is_scored_on_test_once(
    bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = table(
        tmp_path / "test.csv",
        [
            (f"{a} film and {b}", "up" if "good" in (a, b) else "down")
            for a, b in [("good", "we"), ("bad", "we"), ("we", "good"), ("the", "bad")]
        ],
    )
    scored: list[int] = []
    original = Classify.measure

    def measure(self: Classify, inputs: Any, encoder: Any = None) -> Any:
        scored.append(len(inputs))
        return original(self, inputs, encoder)

    monkeypatch.setattr(Classify, "measure", measure)
    folder = tmp_path / "run"
    summary = classify(options(bert, data, test_data=str(test), max_steps=20, eval_every=5, output_dir=str(folder)))
    assert scored == [12, 12, 12, 12, 12, 12, 4]
    assert json.loads((folder / "summary.json").read_text())["test"] == summary["test"]
    report = json.loads((folder / "report.json").read_text())
    assert report["test"]["labels"]["confusion"]["labels"] == ["down", "up"]
    assert "test, step" in (folder / "report.txt").read_text()
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(summary["best_model"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(summary["best_model"])
    with test.open() as file:
        rows = list(csv.DictReader(file))
    logits = plain(**tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")).logits
    right = sum(plain.config.id2label[int(c)] == r["label"] for c, r in zip(logits.argmax(-1), rows, strict=True))
    assert summary["test"]["accuracy"]["value"] == right / 4


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "xlnet"])
def test_every_family_trains_on_pairs_and_loads_in_transformers(family: str, tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "m", family)
    path = tmp_path / "pairs.jsonl"
    rows = [{"text": t, "pair": f"we saw {i}", "label": y} for i, (t, y) in enumerate(opinions(1))]
    path.write_text("\n".join(map(json.dumps, rows)))
    o = options(folder, path, pair_column="pair", max_steps=2, max_length=40, output_dir=str(tmp_path / "run"))
    learner = make_learner(o)
    read = learner.data
    summary = classify(o)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(summary["best_model"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(summary["best_model"])
    learner.encoder.load_state_dict(plain.state_dict())
    texts = [(r["text"], r["pair"]) for r in rows]
    batch = tokenizer([t for t, _ in texts], [p for _, p in texts], padding=True, return_tensors="pt")
    if family == "distilbert":  # generic tokenizers give token types, which this family does not read
        batch.pop("token_type_ids", None)
    theirs = {
        tuple(ids[m == 1].tolist()): z
        for ids, m, z in zip(batch["input_ids"], batch["attention_mask"], plain(**batch).logits, strict=True)
    }
    learner.encoder.eval()
    for group in groups_of([len(x.tokens) for x in read.train], 200):
        inputs = [read.train[i] for i in group]
        ours = item_logits(learner.encoder, padded_batch(inputs, learner.encoder, *learner.pads))
        for x, z in zip(inputs, ours, strict=True):
            assert torch.allclose(z, theirs[tuple(x.tokens)], rtol=1e-4, atol=1e-5)


def test_unequal_costs_change_what_is_said(bert: Path, tmp_path: Path) -> None:
    """One text, seven times calm and three times alarm: the likeliest label is calm, the cheapest is alarm."""
    data = table(tmp_path / "d.csv", [("the film", "calm")] * 7 + [("the film", "alarm")] * 3)
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"alarm": {"calm": -5.0}}))
    said = {}
    for name, more in (
        ("likeliest", {"objective": "cross_entropy"}),
        ("share", {"objective": "policy_gradient"}),
        ("cheapest", {"objective": "policy_gradient", "rewards": str(costs)}),
    ):
        folder = str(tmp_path / name)
        summary = classify(
            options(bert, data, eval_data=str(data), max_steps=25, batch_size=10, output_dir=folder, **more)
        )
        said[name] = summary["dev"]
    assert said["likeliest"]["accuracy"]["value"] == said["share"]["accuracy"]["value"] == 0.7
    assert said["cheapest"]["accuracy"]["value"] == 0.3
    assert said["cheapest"]["reward"] == pytest.approx(0.3)  # saying calm would earn 0.7 - 1.5


def test_long_rows_are_cut_counted_and_reported(
    bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = classify(options(bert, data, max_length=6, max_steps=1, output_dir=str(tmp_path / "run")))
    said = capsys.readouterr().err
    assert summary["data"]["rows"] == {"train": 36, "dev": 12, "test": 0}
    assert summary["data"]["cut"]["train"] > 0
    assert f"cut to max_length 6: {summary['data']['cut']['train']} of train" in said


def test_the_command_end_to_end(bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["classify", "--model", str(bert), "--data", str(data), "--max-steps", "2", "--max-length", "32"]
    assert main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "labels of these items: down" in out or "labels of these items: up" in out
    assert "s per step" in out
    assert main([*words, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["data"]["labels"] == 2
    assert said["prediction"]["step_seconds"] > 0
    assert not (tmp_path / "run").exists()
    assert main([*words, "--json", "--output-dir", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["steps"] == 2
    assert "macro average" in captured.err
    assert main(["explain", "--verb", "classify"]) == 0
    assert "one optimizer step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"data": ""}, ConfigError, "data is missing"),
        ({"max_length": 65}, ConfigError, "max_length is 65, but the model reads 64 tokens"),
        ({"objective": "policy_gradient", "label_smoothing": 0.1}, ConfigError, "belongs to objective = cross_entropy"),
        ({"objective": "policy_gradient_sampled", "num_samples": 1}, ConfigError, "needs num_samples of at least 2"),
        ({"eval_share": 0.0}, ConfigError, "eval_share is 0.0"),
        ({"label_column": "lable"}, DataError, r"train.csv:1: no column 'lable' .*did you mean 'label'"),
    ],
)
def test_bad_options_end_in_one_line(more: Any, error: type[Exception], says: str, bert: Path, data: Path) -> None:
    def attempt() -> None:
        o = options(bert, data, **more)
        o.validate()
        classify(o)

    with pytest.raises(error, match=says):
        attempt()


def test_bad_data_ends_in_one_line(bert: Path, data: Path, tmp_path: Path) -> None:
    other = table(tmp_path / "other.csv", [("the film", "upp")])
    for name in ("eval_data", "test_data"):
        with pytest.raises(DataError, match=r"other.csv:2: label 'upp' does not occur .*did you mean 'up'"):
            classify(options(bert, data, **{name: str(other)}))
    one = table(tmp_path / "one.csv", [("the film", "up"), ("we saw", "up")])
    with pytest.raises(DataError, match="all 2 rows carry the label 'up'"):
        classify(options(bert, one))
    few = table(tmp_path / "few.csv", [("the film", "up"), ("we saw", "down")])
    with pytest.raises(DataError, match="too few to hold some out"):
        classify(options(bert, few))
