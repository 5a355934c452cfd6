"""Reward models: the definition's gradient, folders that transformers reads alike, and what PPO makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_kit import Oracle, asked, pair_rows, relative_gap, step_rows, wide_rows, write
from test_dpo import logsig, moved
from test_recipes import TASK, lines, rl
from test_resume import assert_same, comparable
from tiny_model import tiny_folder, tiny_tokenizer
from torch import Tensor

from upslope.build import load_critic, load_policy
from upslope.cli import main
from upslope.errors import ConfigError, DataError, ModelError, UpslopeError
from upslope.models.files.folders import read_config
from upslope.models.files.loading import load_reward_folder
from upslope.models.files.weights import load as load_weights
from upslope.options import PPOOptions, RewardOptions
from upslope.recipes.ppo import PPO, ppo
from upslope.recipes.reward import RewardLearner, pair_calibration, reward, start_head
from upslope.rewards.networks import RewardModel, load_reward_model
from upslope.rewards.summands import Surroundings
from upslope.training.step import Forward, accumulate, unit_batches
from upslope.types import Example

TWO = [
    {"prompt": asked(1), "chosen": "aab", "rejected": "b", "margin": 0.5},
    {"prompt": asked(22), "chosen": "c", "rejected": "bbbaa"},
]
STEPS = [
    {"prompt": asked(1), "steps": ["ab", "b", "ccc"], "labels": [1, 0, 0.25]},
    {"prompt": asked(22), "steps": ["a"], "labels": [True]},
]


def options(model: Path, data: str, folder: Path, **changes: Any) -> RewardOptions:
    common: dict[str, Any] = {
        "model": str(model),
        "data": data,
        "output_dir": str(folder),
        "batch_size": 8,
        "max_steps": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "eval_every": 0,
        "dtype": "float32",
    }
    return RewardOptions(**(common | changes))


def gradient(learner: RewardLearner, budget: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    learner.optimizer.zero_grad()
    loss, _ = learner.loss_of(learner.units, None)
    batches = unit_batches(learner.units, budget)
    metrics = accumulate(learner.policy.model, batches, loss, Forward(head=learner.head, logp=False, train_final=True))
    return {n: g.clone() for n, g in learner.optimizer.gradients().items()}, metrics


def outcome_loss(oracle: Oracle, w: Tensor) -> Tensor:
    """Margins 0.5 (its own column) and 0.2 (the option), centering 0.1."""
    terms = []
    for row, margin in zip(TWO, (0.5, 0.2), strict=True):
        good, bad = (oracle.hidden(row["prompt"], row[side])[0][-1] @ w for side in ("chosen", "rejected"))
        terms.append(-logsig(good - bad - margin) + 0.1 * (good + bad) ** 2)
    return sum(terms) / 2  # type: ignore[return-value]


def process_loss(oracle: Oracle, w: Tensor) -> Tensor:
    """The mean over all four steps; a byte is a token, so a step ends with the byte after it."""
    terms = []
    for row in STEPS:
        hidden, _, place = oracle.hidden(row["prompt"], "\n".join(row["steps"]))
        for step, label in zip(row["steps"], row["labels"], strict=True):
            place += len(step)
            p = torch.sigmoid(hidden[place] @ w)
            place += 1
            terms.append(-label * p.log() - (1 - label) * (1 - p).log())
    return sum(terms) / 4  # type: ignore[return-value]


KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], Any]] = {
    "outcome": (TWO, {"margin": 0.2, "centering": 0.1}, outcome_loss),
    "process": (STEPS, {"kind": "process"}, process_loss),
}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_the_definition_s(kind: str, tiny: Path, tmp_path: Path) -> None:
    rows, changes, definition = KINDS[kind]
    o = options(tiny, write(tmp_path / "two.jsonl", rows), tmp_path / "run", eval_samples=0, **changes)
    o.validate()
    policy = load_policy(o)
    policy.model.double()
    learner = RewardLearner(o, policy)
    moved(policy)
    found, metrics = gradient(learner, 10_000)
    oracle = Oracle(tiny, policy.tokenizer, dict(policy.model.named_parameters()))
    w = learner.head.score.weight.detach()[0].double().requires_grad_()
    loss = definition(oracle, w)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    oracle.weights["score.weight"] = w
    expected = oracle.gradients(loss)
    expected["score.weight"] = expected["score.weight"][None]
    assert relative_gap(found, expected) < 1e-5
    assert found.keys() == expected.keys()
    for budget in (1, 80):
        again, metrics_again = gradient(learner, budget)
        assert relative_gap(again, found) < 1e-6
        assert metrics_again == pytest.approx(metrics, rel=1e-5)


def test_the_head_starts_small_and_seeded_and_has_no_bias(tiny: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", pair_rows(4))
    policy = load_policy(options(tiny, data, tmp_path))
    one, same, other = (start_head(policy, seed).score.weight.detach() for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert 0.5 < float(one.std()) * math.sqrt(33) < 1.5
    reward(options(tiny, data, tmp_path / "run"))
    _, head, _ = load_reward_folder(tmp_path / "run/checkpoints/last/model")
    assert float(head.score.bias.detach()) == 0.0


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An outcome model that likes 'a' better than all else, and its summary."""
    folder = tmp_path_factory.mktemp("rm")
    data = write(folder / "rows.jsonl", wide_rows(200))
    return reward(options(tiny, data, folder / "run", max_steps=40, centering=0.01))


def test_it_learns_and_says_how_sure_to_be(trained: dict[str, Any]) -> None:
    log = lines(Path(trained["folder"]))
    assert log[0]["loss"] > 0.3
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"] + 1
    found = trained["evaluation"]
    assert found["accuracy"]["value"] == 1.0
    assert found["accuracy"]["n"] == 20
    assert found["brier"] < 0.1
    assert found["eval_loss"] < log[0]["loss"]


def test_the_process_model_learns_which_steps_are_right(tiny: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", step_rows(120))
    summary = reward(options(tiny, data, tmp_path / "run", kind="process", max_steps=40, learning_rate=5e-3))
    found = summary["evaluation"]
    assert found["accuracy"]["value"] > 0.9
    assert found["accuracy"]["n"] > 12
    assert found["brier"] < 0.15
    assert read_config(summary["model"])["upslope_reward"] == {"kind": "process", "aggregate": "min"}


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_transformers_reads_the_folder_with_equal_scores(trained: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = Path(trained["model"])
    theirs, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(theirs).__name__ == "LlamaForSequenceClassification"
    assert theirs.config.num_labels == 1
    model, head, settings = load_reward_folder(folder)
    ours = RewardModel(model, head, settings, tokenizer=None)
    texts = ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\naaa<|im_end|>", "ab", "bbbb<|im_end|>"]
    sequences = [ids_of(text) for text in texts]
    scores = ours.scores([Example(s, [False] + [True] * (len(s) - 1)) for s in sequences])
    with torch.no_grad():
        expected = [float(theirs(torch.tensor([s])).logits[0, 0]) for s in sequences]
    assert [s[0] for s in scores] == pytest.approx(expected, abs=1e-5)
    # the tokenizer pads with the token that ends a turn: reading a padded batch one token too early must not happen
    assert theirs.config.pad_token_id is None


def test_a_padding_token_of_its_own_is_kept_and_batches_agree(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = tiny_folder(tmp_path / "base", tie_word_embeddings=False)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<|im_start|>"
    tokenizer.save_pretrained(base)
    summary = reward(options(base, write(tmp_path / "rows.jsonl", pair_rows(20)), tmp_path / "run"))
    weights = load_weights(summary["model"], torch.float32)
    assert "lm_head.weight" not in weights
    theirs = AutoModelForSequenceClassification.from_pretrained(summary["model"])
    assert theirs.config.pad_token_id == 0
    long, short = ids_of("user: aaa<|im_end|>"), ids_of("b<|im_end|>")
    with torch.no_grad():
        alone = [float(theirs(torch.tensor([s])).logits[0, 0]) for s in (long, short)]
        padded = torch.tensor([long, short + [0] * (len(long) - len(short))])
        mask = torch.tensor([[1] * len(long), [1] * len(short) + [0] * (len(long) - len(short))])
        together = theirs(padded, attention_mask=mask).logits[:, 0].tolist()
    assert together == pytest.approx(alone, abs=1e-5)


def test_adapters_are_merged_into_the_folder(tiny: Path, tmp_path: Path) -> None:
    o = options(tiny, write(tmp_path / "rows.jsonl", pair_rows(40)), tmp_path / "run", lora_rank=4, max_steps=10)
    learner = RewardLearner(o, load_policy(o))
    from upslope.loop.launch import begin
    from upslope.loop.session import train

    with begin(o) as begun:
        summary = train("reward", o, learner, begun)
    _, means = learner.measured()
    weights, start = (load_weights(Path(f), torch.float32) for f in (summary["model"], str(tiny)))
    assert not any("lora" in name for name in weights)
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"])
    again = options(Path(summary["model"]), str(o.data), tmp_path / "again")
    _, found = RewardLearner(again, load_policy(again, trunk=True)).measured()
    assert found == pytest.approx(means, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"kind": "process"}, {"lora_rank": 4}, {"dtype": "bfloat16"}], ids=str)
def test_it_repeats_and_resumes_bit_for_bit(changes: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    rows = step_rows(20) if changes.get("kind") == "process" else pair_rows(20)
    data = write(tmp_path / "rows.jsonl", rows)
    for name in ("whole", "again"):
        reward(options(tiny, data, tmp_path / name, **changes))
    reward(options(tiny, data, tmp_path / "parts", **changes, max_steps=2))
    reward(options(tiny, data, tmp_path / "parts", **changes, resume=True))
    expected = comparable(tmp_path / "whole")
    assert_same(comparable(tmp_path / "again"), expected)
    found = comparable(tmp_path / "parts")
    for name, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name
    assert found["metrics"] == expected["metrics"]


def test_calibration_by_hand() -> None:
    margins = torch.tensor([math.log(3), math.log(3), math.log(3), -math.log(3)])  # p = 3/4, right 3 times of 4
    found = pair_calibration(margins)
    assert found["calibration_error"] == pytest.approx(0.0, abs=1e-6)
    assert found["brier"] == pytest.approx((3 * 0.25**2 + 0.75**2) / 4)
    assert pair_calibration(torch.tensor([-20.0]))["calibration_error"] == pytest.approx(1.0)
    tied = torch.tensor([0.0, math.log(0.54 / 0.46)])  # one bin: half sure and half right, 0.54 sure and right
    assert pair_calibration(tied)["calibration_error"] == pytest.approx((1 - 0.54) / 2)


def test_ppo_with_the_reward_model_as_reward_and_as_critic(trained: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    """The score it was trained to give rises, and with it the share of 'a'."""
    (tmp_path / "letter.py").write_text(TASK)
    task, model = f"{tmp_path}/letter.py:Letter", trained["model"]
    changes: dict[str, Any] = {
        "reward": (f"reward_model:path={model},dtype=float32@0.5", "task@0"),
        "critic": model,
        "max_steps": 20,
        "num_prompts": 4,
        "num_generations": 8,
        "lr_scheduler_type": "constant",
    }
    summary = ppo(PPOOptions(**rl(tiny, task, tmp_path / "run", **changes)))
    log = lines(tmp_path / "run")
    for line in (log[0], log[-1]):
        assert line["reward"] == pytest.approx(0.5 * line["rewards/reward_model/mean"], rel=1e-4, abs=1e-6)
        assert line["reward/errors"] == 0
    for name, gain in (("reward_model", 0.5), ("a", 0.02)):
        first, last = (sum(x[f"rewards/{name}/mean"] for x in part) / 3 for part in (log[:3], log[-3:]))
        assert last > first + gain, name
    assert summary["evaluation"]["accuracy"]["n"] == 8


def test_a_critic_starts_from_the_reward_model(trained: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    o = PPOOptions(**rl(tiny, "chain_sum", tmp_path / "run", critic=trained["model"]))
    critic = load_critic(load_policy(o), trained["model"], o)
    assert torch.equal(critic.head.score.weight, load_weights(trained["model"], torch.float32)["score.weight"])


def test_the_reward_alone_needs_no_task_verdict_and_judges_evaluation(
    trained: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "letter.py").write_text(TASK)
    changes = {"reward": (f"reward_model:path={trained['model']}",), "max_steps": 1}
    options_ = PPOOptions(**rl(tiny, f"{tmp_path}/letter.py:Letter", tmp_path / "run", **changes))
    learner = PPO(options_, load_policy(options_))
    found = learner.evaluate(0)
    learner.close()
    assert found is not None
    assert set(found.metrics) == {"reward"}
    assert math.isfinite(found.value)


def test_another_tokenizer_is_one_clear_line(trained: dict[str, Any], tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["xyz"])
    given = {"around": Surroundings(other, "cpu", tmp_path / "policy")}
    with pytest.raises(ModelError, match=r"different tokenizers; add retokenize=true") as caught:
        load_reward_model(trained["model"], **given)
    assert trained["model"] in str(caught.value)
    assert str(tmp_path / "policy") in str(caught.value)
    assert load_reward_model(trained["model"], retokenize=True, **given).retokenize


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("reward_model", ConfigError, "needs the parameter 'path'"),
        ("reward_model:path={rm},colour=red", ConfigError, "no parameter 'colour'"),
        ("reward_model:path={rm},aggregate=min", ConfigError, "scores whole answers"),
        ("reward_model:path={rm},batch_tokens=0", ConfigError, "batch_tokens"),
        ("reward_model:path={tiny}", ModelError, r"no score\.weight"),
        ("reward_model:path={tmp}/absent", ModelError, "absent"),
        ("reward_modle:path={rm}", ConfigError, "did you mean 'reward_model'"),
    ],
)
def test_bad_reward_specs_are_one_clear_line(
    spec: str, error: type[Exception], said: str, trained: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    filled = spec.format(rm=trained["model"], tiny=tiny, tmp=tmp_path)
    with pytest.raises(error, match=said) as caught:
        ppo(PPOOptions(**rl(tiny, "chain_sum", tmp_path / "run", reward=(filled,))))
    assert "\n" not in str(caught.value)


def step_row(**changes: Any) -> dict[str, Any]:
    return {"prompt": "x", "steps": ["a", "b"], "labels": [1, 0]} | changes


@pytest.mark.parametrize(
    ("rows", "change", "error", "said"),
    [
        ([step_row(), step_row(labels=[1])], {}, DataError, r"rows\.jsonl.*2.*2 steps but 1 labels"),
        ([step_row(steps=["a", " "])], {}, DataError, r"rows\.jsonl.*1.*steps\[1\]"),
        ([step_row(steps=["a\nb", "c"])], {}, DataError, r"rows\.jsonl.*1.*steps\[0\].*newline"),
        ([step_row(labels=[1, 2])], {}, DataError, r"rows\.jsonl.*1.*labels\[1\]"),
        ([step_row(labels=[1, None])], {}, DataError, r"rows\.jsonl.*1.*labels\[1\]"),
        ([{"prompt": "x"}], {}, DataError, r"rows\.jsonl.*1.*'steps' is missing"),
        (pair_rows(2), {}, DataError, r"rows\.jsonl.*1.*'steps' is missing"),
        ([step_row()], {"centering": 0.1}, ConfigError, "centering"),
        ([step_row()], {"kind": "outcome"}, DataError, r"rows\.jsonl.*1.*chosen"),
        (pair_rows(2), {"kind": "outcome", "aggregate": "prod"}, ConfigError, "aggregate"),
        ([TWO[0] | {"margin": "wide"}], {"kind": "outcome"}, DataError, r"rows\.jsonl.*1.*margin"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_bad_input_is_one_clear_line(
    rows: list[Any], change: dict[str, Any], error: type[Exception], said: str, tiny: Path, tmp_path: Path
) -> None:
    o = options(tiny, write(tmp_path / "rows.jsonl", rows), tmp_path / "run", **{"kind": "process", **change})

    def checked() -> None:
        o.validate()
        reward(o)

    with pytest.raises(error, match=said) as caught:
        checked()
    assert isinstance(caught.value, UpslopeError)
    assert "\n" not in str(caught.value)


def test_command_and_dry_run(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", step_rows(20))
    words = ["reward", "--kind", "process", "--model", str(tiny), "--data", "rows.jsonl", "--max-steps", "2", "--json"]
    assert main([*words, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["prediction"]["step_seconds"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]
    assert main([*words, "--output-dir", "run"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
