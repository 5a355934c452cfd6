"""What every supervised recipe shares, as its optimizer gets it in a run: rates, clipping, decay, budgets, adapters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import Taken, watch
from supervised_kit import LEARNERS, PAIRS, assert_adamw, network_of, pair_row, pairs_file, rows_of_step, trained_logp
from test_exact_encoders import text_losses
from torch import Tensor

from upslope.loop.kept import DataAccount
from upslope.loop.launch import begin
from upslope.loop.session import train
from upslope.options import SFTOptions
from upslope.preview.plan import plan_of
from upslope.training.checkpoint import list_checkpoints, resolve
from upslope.training.stopping import Evaluation, StepResult

pytestmark = pytest.mark.usefixtures("in_float64")

RATES: dict[str, list[float]] = {
    "constant": [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0],
    "linear": [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25],
    "cosine": [1 / 3, 2 / 3, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2],
}
"""Of six steps, two of them warm-up: the peak is at the third, and one after the last would be 0."""
RECIPES = sorted(LEARNERS)


KINDS = {"tag": "constant", "pretrain": "linear", "masked": "linear", "classify": "cosine", "seq2seq": "cosine"}
"""Where a recipe's own default would not do."""


@pytest.mark.parametrize(("kind", "recipe"), [("linear", "sft"), ("cosine", "sft"), *((KINDS[r], r) for r in KINDS)])
def test_every_step_is_adamws_at_its_rate_with_clipping_and_decay(kind: str, recipe: str, tmp_path: Path) -> None:
    """The whole accumulated gradient is clipped, once; matrices decay, norms and biases do not; a head has its rate."""
    head = {"head_lr_factor": 5.0} if recipe in ("classify", "tag") else {}
    changes = {"lr_scheduler_type": kind, "warmup_steps": 2, "max_steps": 6, "weight_decay": 0.5, **head}
    learner = LEARNERS[recipe](tmp_path, max_grad_norm=0.5, micro_batch_tokens=16, **changes)
    network, steps, clipped = network_of(learner), watch(learner.optimizer), 0
    for step in range(6):
        result = learner.step(step)
        assert result.metrics["learning_rate"] == steps[step].learning_rate
        squares = sum(float(g.square().sum()) for g in steps[step].gradients.values())
        assert result.metrics["grad_norm"] == pytest.approx(math.sqrt(squares))
        clipped += squares > 0.25
    assert [taken.learning_rate for taken in steps] == pytest.approx([1e-2 * rate for rate in RATES[kind]])
    assert clipped
    assert_adamw(
        steps,
        {name: p.detach() for name, p in network.named_parameters()},
        max_norm=0.5,
        decay=0.5,
        factor=lambda name: 5.0 if head and is_head(name) else 1.0,
    )


def is_head(name: str) -> bool:
    """Of BERT with a head on it; what pools the trunk's states belongs to the head."""
    return name.startswith(("classifier.", "bert.pooler."))


@pytest.mark.parametrize("recipe", ["sft", "masked", "tag"])
def test_no_clipping_without_a_limit(recipe: str, tmp_path: Path) -> None:
    learner = LEARNERS[recipe](tmp_path, max_grad_norm=0.0)
    steps = watch(learner.optimizer)
    learner.step(0)
    learner.step(1)
    after = {name: p.detach() for name, p in network_of(learner).named_parameters()}
    assert_adamw(steps, after, max_norm=0.0, decay=0.0)


def block_of(network: torch.nn.Module) -> torch.nn.Module:
    """The first layer: what is computed twice when activations are recomputed."""
    return next(m for name, m in network.named_modules() if name.endswith(("layers.0", "layer.0")))


def first_step(recipe: str, folder: Path, **changes: Any) -> tuple[Taken, int, int]:
    """The step, how many passes the network made in it, and how often a layer was computed."""
    learner = LEARNERS[recipe](folder, **changes)
    network, calls = network_of(learner), Counter[str]()
    run = network.network if hasattr(network, "network") else network
    run.register_forward_pre_hook(lambda *_: calls.update(["pass"]))
    for name, part in block_of(network).named_modules():
        part.register_forward_pre_hook(lambda *_, name=name: calls.update([f"layer {name}"]))
    steps = watch(learner.optimizer)
    learner.step(0)
    return steps[0], calls.pop("pass"), max(calls.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_memory_is_saved_without_another_gradient(recipe: str, tmp_path: Path) -> None:
    """Small micro-batches make more passes, gradient checkpointing computes a layer twice in each."""
    plain, passes, layers = first_step(recipe, tmp_path)
    assert passes <= layers
    other = {"small": {"micro_batch_tokens": 12}, "again": {"gradient_checkpointing": True}}
    for name, changes in other.items():
        found, more, computed = first_step(recipe, tmp_path, **changes)
        assert more > passes if name == "small" else more == passes
        assert computed == more if name == "small" else computed == 2 * layers
        assert found.gradients.keys() == plain.gradients.keys()
        for key, gradient in plain.gradients.items():
            torch.testing.assert_close(found.gradients[key], gradient, rtol=1e-9, atol=1e-12, msg=f"{name} {key}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_masters_of_a_narrow_run_are_the_weights_as_they_were(recipe: str, tmp_path: Path) -> None:
    """Not what bfloat16 made of them."""
    full = LEARNERS[recipe](tmp_path).optimizer.weights()
    narrow = LEARNERS[recipe](tmp_path, dtype="bfloat16")
    assert next(network_of(narrow).parameters()).dtype == torch.bfloat16
    masters = narrow.optimizer.weights()
    assert masters.keys() == full.keys()
    assert all(torch.equal(masters[name], w.float()) for name, w in full.items())


# Adapters


def merged(weights: Mapping[str, Tensor], taken: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """W + scale B A wherever there are adapters (2106.09685, section 4.1), other trained weights as they are."""
    found = {name: w.clone() for name, w in weights.items()}
    for name, down in taken.items():
        if ".lora_A." in name:
            up = taken[name.replace("lora_A", "lora_B")]
            found[name.replace(".lora_A.default", "")] += scale * up @ down
        elif ".lora_B." not in name:
            found[name] = taken[name]
    return found


def assert_adapter_gradients(taken: Taken, gradients: Mapping[str, Tensor], scale: float, rank: int) -> None:
    """By the chain rule from the gradient G in the merged weights: scale B' G for A, scale G A' for B."""
    adapters = 0
    for name, found in taken.gradients.items():
        if ".lora_A." in name:
            G, up = gradients[name.replace(".lora_A.default", "")], taken.weights[name.replace("lora_A", "lora_B")]
            wanted, adapters = scale * up.T @ G, adapters + 1
            assert len(found) == rank
        elif ".lora_B." in name:
            G, down = gradients[name.replace(".lora_B.default", "")], taken.weights[name.replace("lora_B", "lora_A")]
            wanted = scale * G @ down.T
        else:
            wanted = gradients[name]
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-11, msg=name)
    assert adapters


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (5.0, 2.5)])
@pytest.mark.parametrize("recipe", ["sft", "classify"])
def test_adapters_get_their_share_of_the_gradient_and_nothing_else_moves(
    recipe: str, alpha: float | None, scale: float, tmp_path: Path
) -> None:
    """Three steps of adapters of rank 2, by the whole model's gradient at the merged weights."""
    learner = LEARNERS[recipe](tmp_path, lora_rank=2, lora_alpha=alpha, weight_decay=0.5)
    plain, steps = network_of(LEARNERS[recipe](tmp_path)), watch(learner.optimizer)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for step in range(3):
        rows = rows_of_step(learner, step)
        learner.step(step)
        plain.load_state_dict(merged(start, steps[step].weights, scale), strict=False)
        if recipe == "sft":
            loss = -torch.cat([trained_logp(plain, pair_row(*PAIRS[i]))[0] for i in rows]).mean()
        else:
            whole = replace(learner.options, lora_rank=0)
            loss = text_losses(plain, whole, step, rows, torch.eye(3))
        gradients = torch.autograd.grad(loss, list(plain.parameters()), allow_unused=True)
        named = dict(zip(start, gradients, strict=True))
        assert_adapter_gradients(steps[step], {n: g for n, g in named.items() if g is not None}, scale, 2)
    trained = set(learner.optimizer.weights())
    assert {is_head(name) for name in trained if ".lora_" not in name} == ({True} if recipe == "classify" else set())
    for name, p in network_of(learner).named_parameters():
        if name not in trained:
            assert torch.equal(p, start[name.replace(".base_layer.", ".")]), name
    if recipe == "classify":
        written = learner.encoder.weights(learner.optimizer.weights())
        wanted = merged(start, learner.optimizer.weights(), scale)
        assert all(torch.allclose(w, wanted[name], rtol=0, atol=1e-12) for name, w in written.items())


# When a run looks, saves and stops


class Scripted:
    """A learner whose held-out measure is written down: of each evaluation in turn, the last one from then on."""

    account = DataAccount()
    run = None

    def __init__(self, values: list[float], *, higher: bool = True) -> None:
        self.values, self.higher_is_better = values, higher
        self.looked: list[int] = []
        self.drawn: list[float] = []

    def trained_on(self) -> tuple[None, Iterator[Any]]:
        return None, iter([])

    def step(self, step: int) -> StepResult:
        assert step == len(self.drawn)
        self.drawn.append(float(torch.rand(())))
        return StepResult({"loss": 1.0, "grad_norm": 1.0}, 10)

    def evaluate(self, step: int) -> Evaluation:
        if not step:
            return Evaluation("measure", {"measure": -1.0})
        self.looked.append(step)
        value = self.values[min(len(self.looked), len(self.values)) - 1]
        return Evaluation("measure", {"measure": value})

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def write_model(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "steps").write_text(str(len(self.drawn)))


def scripted(folder: Path, learner: Scripted, **changes: Any) -> dict[str, Any]:
    """The summary of its run of at most seven steps."""
    common: dict[str, Any] = {"max_steps": 7, "eval_every": 3, "save_every": 2, "keep_last": 9}
    options = SFTOptions(data=pairs_file(folder / "rows.jsonl"), output_dir=str(folder / "run"), **common | changes)
    options.validate()
    with begin(options) as begun:
        return train("sft", options, learner, begun)


RISING, FALLING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
HUMP = [0.1, 0.5, 0.4, 0.45, 0.3]
CASES: dict[str, tuple[dict[str, Any], list[float], bool, list[int], list[int], int, str]] = {
    "all steps": ({}, RISING, True, [3, 6, 7], [2, 3, 4, 6, 7], 7, "max_steps"),
    "the end alone": ({"eval_every": 0, "save_every": 5}, RISING, True, [7], [5, 7], 7, "max_steps"),
    "the last is no better": ({"eval_every": 2}, HUMP, True, [2, 4, 6, 7], [2, 4, 6, 7], 4, "max_steps"),
    "tokens": ({"max_tokens": 25}, RISING, True, [3], [2, 3], 3, "max_tokens"),
    "tokens to the last": ({"max_tokens": 30}, RISING, True, [3], [2, 3], 3, "max_tokens"),
    "high target": ({"target": 0.2, "eval_every": 1}, RISING, True, [1, 2], [1, 2], 2, "target"),
    "low target": ({"target": 0.5, "eval_every": 1}, FALLING, False, [1, 2, 3], [1, 2, 3], 3, "target"),
    "high patience": ({"patience": 3, "eval_every": 1}, HUMP, True, [1, 2, 3, 4, 5], [1, 2, 4, 5], 2, "patience"),
    "low patience": ({"patience": 2, "eval_every": 2}, RISING, False, [2, 4, 6], [2, 4, 6], 2, "patience"),
    "few kept": ({"keep_last": 1, "eval_every": 2}, HUMP, True, [2, 4, 6, 7], [4, 7], 4, "max_steps"),
}
"""Options, measures, whether higher is better; steps of the evaluations, of the checkpoints, of the best; the end."""


@pytest.mark.parametrize("case", CASES)
def test_when_a_run_looks_saves_and_stops(case: str, tmp_path: Path) -> None:
    changes, values, higher, looked, saved, best, said = CASES[case]
    learner = Scripted(values, higher=higher)
    summary = scripted(tmp_path, learner, **changes)
    folder = tmp_path / "run" / "checkpoints"
    assert learner.looked == looked
    assert sorted(found.step for found in list_checkpoints(folder)) == saved
    assert resolve(folder, "best").step == best
    assert (folder / "best/model/steps").read_text() == str(best)
    assert summary["stopped"].startswith(said)
    assert summary["steps"] == looked[-1] == saved[-1]
    assert summary["trained_tokens"] == 10 * summary["steps"]
    assert summary["evaluation"] == {"measure": values[len(looked) - 1]}


def test_a_run_draws_by_its_seed(tmp_path: Path) -> None:
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        learner = Scripted(RISING)
        (tmp_path / name).mkdir()
        torch.rand(len(drawn))
        scripted(tmp_path / name, learner, seed=seed, max_steps=2, eval_every=0, save_every=9)
        drawn.append(learner.drawn)
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_schedule_begins_at_the_resume_where_it_was(tmp_path: Path) -> None:
    """The step that a learner is given counts over all launches, as do the trained tokens and the patience."""
    scripted(tmp_path, Scripted([0.5]), max_steps=3)
    again = Scripted([0.4, 0.3])
    again.drawn = [0.0] * 3
    again.load = lambda model, tensors, state: None  # type: ignore[attr-defined]
    summary = scripted(tmp_path, again, resume=True, max_tokens=55, patience=1, eval_every=5)
    assert (summary["steps"], summary["trained_tokens"]) == (5, 50)
    assert summary["stopped"].startswith("patience")
    assert resolve(tmp_path / "run/checkpoints", "best").step == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval_every": 3}, "evaluation runs 3 times on up to 200 samples"),
        ({"eval_every": 0}, "evaluation runs 1 time on up to 200 samples"),
        ({"num_epochs": 3.0}, "num_epochs = 3 over 10 sequences sets max_steps to 8."),
        ({"batch_size": 5}, "7 steps see 35 sequences: 3.5 passes over the data."),
        ({"num_epochs": 3.0, "eval_every": 0}, "It stops after 8 steps."),
        ({"max_seconds": 9.0}, "It stops after 7 steps or 9 seconds, whichever comes first."),
    ],
)
def test_the_plan_counts_as_the_run_does(changes: dict[str, Any], said: str) -> None:
    """Of seven steps, four of ten rows each."""
    plan = plan_of(SFTOptions(data="x", max_steps=7, **{"batch_size": 4} | changes), examples=10)
    assert said in " ".join(plan.words)
    assert plan.optimizer_steps == (8 if "num_epochs" in changes else 7)
    assert plan.sequences_per_step == changes.get("batch_size", 4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_epochs_are_passes_over_the_rows(recipe: str, tmp_path: Path) -> None:
    learner = LEARNERS[recipe](tmp_path, num_epochs=2.0)
    size = learner.options.batch_size
    rows = {"sft": 5, "classify": 6, "tag": 3, "seq2seq": 5}.get(recipe)
    if rows is None:  # windows of nine tokens that share one with the next, or of seven within a frame of two
        text = len(learner.texts.train.tokens)
        rows = math.ceil(text / 7) if recipe == "masked" else math.ceil((text - 1) / 8)
    assert rows > size
    assert learner.options.max_steps == round(2 * rows / size)
