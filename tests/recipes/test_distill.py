"""Distillation on a tiny student and teacher: exact however cut; it learns, repeats, resumes, says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_folder, tiny_tokenizer
from torch import Tensor

from upslope.build import load_policy
from upslope.data.batching import collate
from upslope.errors import ConfigError, DataError, ModelError
from upslope.functional.supervised_losses import divergence
from upslope.models.attention.context import PackedContext
from upslope.models.files.weights import load as load_weights
from upslope.options import DistillOptions
from upslope.preview.dry_run import run as dry_run
from upslope.recipes.distill import Distill, distill
from upslope.runs.folder import Run
from upslope.training.step import Forward, accumulate
from upslope.types import Example

TASK = """
from upslope.tasks.base import Task, chat_prompt, select_prompts
from upslope.types import Message, Reward


class Letter(Task):
    name = "letter"

    def prompts(self, split, n, *, seed):
        return select_prompts((chat_prompt(f"Say {i}", answer="a") for i in range(500)), split, n, name=self.name)

    def rewards(self, prompts, completions):
        return [Reward(float("a" in text), correct="a" in text) for text in completions]

    def demonstration(self, prompt):
        return (*prompt.messages, Message("assistant", "aaaa"))
"""


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another width and depth, other weights, the same vocabulary."""
    return tiny_folder(
        tmp_path_factory.mktemp("models") / "teacher", seed=7, hidden_size=48, num_hidden_layers=1, head_dim=12
    )


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "letter.py"
    path.write_text(TASK)
    return f"{path}:Letter"


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [{"prompt": f"Say {i}", "completion": "abc"[i % 3] * (1 + i % 4)} for i in range(40)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def options(tiny: Path, teacher: Path, folder: Path, /, **changes: Any) -> DistillOptions:
    common: dict[str, Any] = {
        "model": str(tiny),
        "teacher": str(teacher),
        "output_dir": str(folder),
        "num_train_prompts": 40,
        "num_prompts": 6,
        "max_completion_length": 6,
        "max_steps": 4,
        "eval_samples": 8,
        "eval_every": 0,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "dtype": "float32",
    }
    made = DistillOptions(**{**common, **changes})
    made.validate()
    return made


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"eval/' not in line]


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_gradient_is_that_of_the_full_logits_however_the_batch_is_cut(
    kind: Any, tiny: Path, teacher: Path, rows: Path, tmp_path: Path
) -> None:
    o = options(tiny, teacher, tmp_path / "run", data=str(rows), divergence=kind, temperature=0.8)
    learner = Distill(o, load_policy(o))
    student, guide = learner.policy.model.double(), learner.teacher.double()
    examples = [item.example for item in learner.items[:5] if item.example is not None]
    trained = sum(sum(e.mask) for e in examples)
    weighted = [
        Example(e.tokens, e.mask, {"weight": torch.full((sum(e.mask),), 1 / trained, dtype=torch.float64)})
        for e in examples
    ]
    whole = collate(weighted)

    def logits(model: Any) -> Tensor:
        hidden = model(whole.tokens_T, PackedContext(whole.lengths, whole.parents, device="cpu"))
        return hidden[whole.rows_N] @ model.head_weight.T / 0.8

    value = divergence(logits(student), logits(guide), kind=kind).mean()
    value.backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters()}
    for parts in ([[0, 1, 2, 3, 4]], [[4], [1, 0], [2, 3]]):
        student.zero_grad()
        batches = [collate([weighted[i] for i in part]) for part in parts]
        totals = accumulate(
            student, batches, lambda batch, out: learner._loss(batch, out, []), Forward(logp=False, hidden=True)
        )
        assert totals["loss"] == pytest.approx(value.item(), abs=1e-12)
        for name, p in student.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=1e-10)
    assert all(p.grad is None for p in guide.parameters())


@pytest.mark.parametrize(
    "change",
    [{"divergence": "reverse"}, {"divergence": "forward"}, {"divergence": "jsd", "on_policy_fraction": 0.5}],
    ids=["reverse", "forward", "gkd"],
)
def test_the_held_out_divergence_falls(
    change: dict[str, Any], tiny: Path, teacher: Path, rows: Path, tmp_path: Path
) -> None:
    o = options(tiny, teacher, tmp_path / "run", data=str(rows), max_steps=25, learning_rate=1e-2, **change)
    learner = Distill(o, load_policy(o))
    before = learner.evaluate(0)
    assert before is not None
    summary = distill(o)
    assert summary["evaluation"]["eval_divergence"]["value"] < 0.6 * before.value
    assert not learner.higher_is_better


def test_a_student_that_is_the_teacher_has_nothing_to_learn(tiny: Path, rows: Path, tmp_path: Path) -> None:
    distill(options(tiny, tiny, tmp_path / "run", data=str(rows), max_steps=1))
    line = lines(tmp_path / "run")[0]
    assert abs(line["loss"]) < 1e-6
    assert line["grad_norm"] < 1e-5


def test_the_share_of_own_answers_is_exact_over_the_steps(tiny: Path, teacher: Path, task: str, tmp_path: Path) -> None:
    o = options(tiny, teacher, tmp_path / "run", task=task, on_policy_fraction=0.4, num_generations=2)
    distill(o)
    with Run.open(tmp_path / "run", read_only=True) as run:
        # 6 x 0.4 = 2.4 prompts a step: 2, 2, 3, 2, two samples each
        assert run.store.rollout_steps("train") == [(1, 4), (2, 4), (3, 6), (4, 4)]
        row = run.store.rollouts(split="train", limit=1)[0]
        stored = run.store.rollout(row.id)
        assert len(stored.arrays["divergence"]) == len(stored.arrays["tokens"])
        mean = sum(stored.arrays["divergence"]) / len(stored.arrays["divergence"])
        assert row.reward == pytest.approx(-mean, abs=1e-6)
    for line in lines(tmp_path / "run"):
        assert min(line["distill/on_policy"], line["distill/off_policy"]) - 1e-6 <= line["loss"]
        assert line["loss"] <= max(line["distill/on_policy"], line["distill/off_policy"]) + 1e-6


def test_micro_batches_change_nothing_but_rounding(tiny: Path, teacher: Path, rows: Path, tmp_path: Path) -> None:
    losses = []
    for budget in (24, 4096):
        o = options(
            tiny, teacher, tmp_path / str(budget), data=str(rows), micro_batch_tokens=budget, on_policy_fraction=0.5
        )
        distill(o)
        losses.append([line["loss"] for line in lines(tmp_path / str(budget))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)


@pytest.mark.parametrize("change", [{}, {"lora_rank": 4, "on_policy_fraction": 0.5}], ids=["all weights", "adapters"])
def test_repeats_and_resumes_bit_for_bit(
    change: dict[str, Any], tiny: Path, teacher: Path, task: str, tmp_path: Path
) -> None:
    runs = ("a", "c") if change else ("a", "b", "c")
    for run in runs[:-1]:
        distill(options(tiny, teacher, tmp_path / run, task=task, **change))
    distill(options(tiny, teacher, tmp_path / "c", task=task, max_steps=2, **change))
    distill(options(tiny, teacher, tmp_path / "c", task=task, resume=True, **change))
    name = "adapter_model.safetensors" if "lora_rank" in change else "model.safetensors"
    contents = {(tmp_path / run / "checkpoints" / "last" / "model" / name).read_bytes() for run in runs}
    assert len(contents) == 1


def test_data_without_completions_and_documents(tiny: Path, teacher: Path, tmp_path: Path) -> None:
    prompts, documents = tmp_path / "prompts.jsonl", tmp_path / "documents.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {i}"}) + "\n" for i in range(20)))
    documents.write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(20)))
    assert (
        distill(options(tiny, teacher, tmp_path / "a", data=str(prompts)))["evaluation"]["eval_divergence"]["value"] > 0
    )
    summary = distill(options(tiny, teacher, tmp_path / "b", data=str(documents), on_policy_fraction=0.0))
    assert summary["evaluation"]["eval_divergence"]["value"] > 0
    with pytest.raises(ConfigError, match="on_policy_fraction = 1"):
        distill(options(tiny, teacher, tmp_path / "c", data=str(prompts), on_policy_fraction=0.5))
    with pytest.raises(ConfigError, match="on_policy_fraction = 0"):
        distill(options(tiny, teacher, tmp_path / "d", data=str(documents)))


def test_another_vocabulary_is_one_clear_line(tiny: Path, rows: Path, tmp_path: Path) -> None:
    narrow = tiny_folder(tmp_path / "narrow", vocab_size=200)
    other = tiny_folder(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    for folder, said in ((narrow, "embeds only 200 tokens"), (other, "'<new>' is 258 in it and unknown")):
        with pytest.raises(ModelError, match=said) as caught:
            distill(options(tiny, folder, tmp_path / "run", data=str(rows)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"teacher": None}, ConfigError, "name the teacher"),
        ({"task": "chain_sum", "data": "x.jsonl"}, ConfigError, "exactly one of --data and --task"),
        ({}, ConfigError, "exactly one of --data and --task"),
        ({"data": "{tmp}/absent.jsonl"}, DataError, "absent.jsonl"),
        ({"data": "{rows}", "teacher": "{tmp}/absent"}, ModelError, "absent"),
        ({"data": "{rows}", "on_policy_fraction": 1.5}, ConfigError, "on_policy_fraction"),
        ({"data": "{rows}", "jsd_weight": 1.0, "divergence": "jsd"}, ConfigError, "jsd_weight"),
        ({"data": "{rows}", "jsd_weight": 0.1}, ConfigError, "divergence = jsd"),
        ({"data": "{rows}", "temperature": 0.0}, ConfigError, "temperature"),
        ({"task": "chain_sum", "eval_data": "{rows}"}, ConfigError, "eval_data goes with data"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_input_is_one_clear_line(
    change: dict[str, Any], error: type[Exception], said: str, tiny: Path, teacher: Path, rows: Path, tmp_path: Path
) -> None:
    filled = {
        k: v.replace("{tmp}", str(tmp_path)).replace("{rows}", str(rows)) if isinstance(v, str) else v
        for k, v in change.items()
    }
    with pytest.raises(error, match=said) as caught:
        distill(options(tiny, teacher, tmp_path / "run", **filled))
    assert "\n" not in str(caught.value)


def test_dry_run(
    tiny: Path, teacher: Path, rows: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change in ({"data": str(rows), "on_policy_fraction": 0.5}, {"task": task, "num_generations": 2}):
        dry_run(options(tiny, teacher, tmp_path / "run", json=True, **change))
        said = json.loads(capsys.readouterr().out)
        assert said["plan"]["optimizer_steps"] == 4
        assert said["prediction"]["step_seconds"] > 0
    assert not (tmp_path / "run").exists()


def test_weights_are_a_model_folder(tiny: Path, teacher: Path, rows: Path, tmp_path: Path) -> None:
    summary = distill(options(tiny, teacher, tmp_path / "run", data=str(rows), dtype="bfloat16"))
    loaded = load_weights(Path(summary["model"]), torch.float32)
    assert loaded["model.norm.weight"].dtype == torch.float32
