"""What the speed benchmarks count by hand, and the baselines they measure against."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from benchmarks import counting, gpu, roofline
from benchmarks.exactness import gap, trainer_logp
from benchmarks.inexact import FORMS, inexact
from benchmarks.roofline import decode, decode_figures, target_line
from benchmarks.scaling import doubling_ratios, heavy_tailed, uniform
from benchmarks.workload import Learner, Task, experience, random_decoder, spread_lengths
from upslope.data.batching import collate
from upslope.functional.logprobs import linear_token_logprobs
from upslope.models.attention.context import PackedContext
from upslope.training.step import Forward
from upslope.types import Example

LAYERS, WIDTH, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY = 2, 64, 128, 4, 2, 16, 512
LAYER = WIDTH * HEADS * HEAD * 2 + 2 * WIDTH * KV_HEADS * HEAD + 3 * WIDTH * INNER
"""Weights of one layer's matrices: q, o; k, v; gate, up, down."""


def tiny(**changes: Any):  # type: ignore[no-untyped-def]
    return random_decoder(quick=True, initializer_range=0.2, **changes)


def a_batch():  # type: ignore[no-untyped-def]
    """A prompt of 5 tokens with completions of 3 and 4, and a sequence of 2 + 6."""
    prompt, other = [3, 4, 5, 6, 7], [9, 8]
    examples = [
        Example([*prompt, 10, 11, 12], [False] * 5 + [True] * 3),
        Example([*prompt, 20, 21, 22, 23], [False] * 5 + [True] * 4),
        Example([*other, 1, 2, 3, 4, 5, 6], [False] * 2 + [True] * 6),
    ]
    return collate(examples, share_prompts=True)


class TestCounts:
    def test_linear_layers_are_counted_without_the_head(self) -> None:
        tied, untied = tiny(), tiny(tie_word_embeddings=False)
        assert counting.linear_size(tied, tied.head_weight) == LAYERS * LAYER
        assert counting.linear_size(untied, untied.head_weight) == LAYERS * LAYER

    def test_pairs_by_hand(self) -> None:
        assert counting.attended_pairs([4], [-1]) == 1 + 2 + 3 + 4
        assert counting.attended_pairs([5, 3, 4], [-1, 0, 0]) == 15 + (6 + 7 + 8) + (6 + 7 + 8 + 9)

    def test_training_by_hand(self) -> None:
        batch = a_batch()
        counts = counting.training_counts(tiny(), [batch, batch], head_again=True)
        tokens, trained = 2 * (5 + 3 + 4 + 8), 2 * (3 + 4 + 6)
        pairs = 2 * (15 + 21 + 30 + 36)
        head = VOCABULARY * WIDTH
        assert counts == {
            "linear forward": tokens * LAYERS * LAYER,
            "linear backward, inputs": tokens * LAYERS * LAYER,
            "linear backward, weights": tokens * LAYERS * LAYER,
            "attention forward": 2 * pairs * LAYERS * HEADS * HEAD,
            "attention backward": 4 * pairs * LAYERS * HEADS * HEAD,
            "attention scores again": pairs * LAYERS * HEADS * HEAD,
            "head forward": trained * head,
            "head backward, inputs": trained * head,
            "head backward, weights": trained * head,
            "head again": trained * head,
        }

    def test_tokens_without_gradient_do_not_go_back_through_the_head(self) -> None:
        counts = counting.training_counts(
            tiny(), [a_batch()], head_again=False, moving=lambda batch: batch.sequence_N == 1
        )
        assert counts["head forward"] == 13 * VOCABULARY * WIDTH
        assert counts["head backward, inputs"] == counts["head backward, weights"] == 4 * VOCABULARY * WIDTH
        assert "head again" not in counts

    def test_checkpointing_is_counted(self) -> None:
        model = tiny()
        model.gradient_checkpointing = True
        counts = counting.training_counts(model, [a_batch()], head_again=False)
        assert counts["layers again"] == counts["linear forward"] + counts["attention forward"]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_formula_is_what_torch_runs(self, dtype: torch.dtype) -> None:
        model = tiny().to(dtype)
        examples = [Example(list(range(3, 43)), [False] * 10 + [True] * 30) for _ in range(2)]
        batch = collate(examples)

        def both() -> None:
            out = Forward()(model, batch)
            out.logp_N.sum().backward()

        seen = counting.products_seen(both)
        counts = counting.training_counts(model, [batch], head_again=counting.head_is_repeated(model))
        products = sum(n for part, n in counts.items() if not part.startswith("attention"))
        assert seen == products
        assert counting.executed(counts, seen) == sum(counts.values())
        assert counting.executed(counts, seen - 7) == sum(counts.values()) - 7

    def test_head_is_repeated_where_it_is(self) -> None:
        model = tiny()
        hidden = torch.randn(64, WIDTH, requires_grad=True)
        targets = torch.arange(64)
        seen = counting.products_seen(
            lambda: linear_token_logprobs(hidden, model.head_weight, targets).sum().backward()
        )
        assert seen == (4 if counting.head_is_repeated(model) else 3) * 64 * VOCABULARY * WIDTH

    def test_decoding_by_hand(self) -> None:
        model = tiny().to(torch.bfloat16)
        multiply_adds, moved = counting.decode_counts(model, [10, 30])
        weights = LAYERS * LAYER + VOCABULARY * WIDTH
        assert multiply_adds == 2 * weights + 2 * 40 * LAYERS * HEADS * HEAD
        assert moved == 2 * (weights + 2 * 40 * LAYERS * KV_HEADS * HEAD)

    def test_the_roofline_is_the_slower_of_the_two(self) -> None:
        assert counting.roofline_seconds(50, 10, rate=100.0, bandwidth=10.0) == 1.0
        assert counting.roofline_seconds(50, 30, rate=100.0, bandwidth=10.0) == 3.0

    def test_rates_are_finite(self) -> None:
        rate = counting.matrix_rate(torch.float32, shapes=((32, 16, 8), (8, 8, 8)), seconds=0.001)
        assert rate["operations_per_second"] == max(rate["by_shape"].values()) > 0
        memory = counting.bandwidth(size=2**16, seconds=0.001)
        assert memory["bytes_per_second"] == memory["by_operation"][memory["operation"]] > 0


class TestDecoding:
    def test_every_step_decodes_all_rows(self) -> None:
        model = tiny()
        steps = decode(model, [[3] * 60, [4] * 5], 8)
        assert [contexts for _, contexts in steps] == [[60 + i, 5 + i] for i in range(1, 9)]
        figures = decode_figures(steps, model, rate=1e12, bandwidth=1e12)
        assert 0 < figures["share_of_roofline"]["median"] < 1


class TestScaling:
    def test_doubling_ratios(self) -> None:
        assert doubling_ratios({1: 2.0, 4: 6.0, 2: 3.0}) == {"1->2": 1.5, "2->4": 2.0}

    @pytest.mark.parametrize("make", [uniform, heavy_tailed])
    def test_lengths_add_up(self, make: Any) -> None:
        lengths = make(64, 64 * 48)
        assert len(lengths) == 64
        assert sum(lengths) == 64 * 48
        assert min(lengths) >= 1
        with pytest.raises(ValueError, match="at least one"):
            make(64, 63)

    def test_tails(self) -> None:
        assert 1.9 * 48 < max(uniform(64, 64 * 48)) <= 2 * 48 + 1
        assert max(heavy_tailed(64, 64 * 48)) > 7 * 48
        assert sorted(heavy_tailed(64, 64 * 48))[32] < 48

    def test_spread_lengths(self) -> None:
        assert spread_lengths(16, 32, 3) == [16, 24, 32]
        assert spread_lengths(16, 32, 1) == [16]


class TestWorkload:
    def test_lengths_are_obeyed_and_the_update_trains(self) -> None:
        task = Task.random(VOCABULARY, [5, 6], [[3, 7], [4, 4]])
        learner = Learner.of(tiny(), dtype=torch.float32)
        groups = task.rollout(task.engine(learner.model))
        assert [[len(r.tokens) for r in g.rollouts] for g in groups] == task.lengths
        assert [r.prompt_tokens for g in groups for r in g.rollouts] == [
            task.prompts[0],
            task.prompts[0],
            task.prompts[1],
            task.prompts[1],
        ]
        assert task.tokens == 2 * 5 + 2 * 6 + 18
        before = learner.model.head_weight.detach().clone()
        learner.update(experience(groups))
        assert not torch.equal(before, learner.model.head_weight)

    def test_requests_one_by_one_bring_as_many_samples(self) -> None:
        task = Task.random(VOCABULARY, [5], [[3, 3]], one_by_one=True)
        (group,) = task.rollout(task.engine(tiny()))
        assert [r.sample for r in group.rollouts] == [0, 1]


class TestExactness:
    def test_gap(self) -> None:
        found = gap(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5]))
        assert found == {"max": 0.5, "mean": 0.25, "differing_tokens": 1, "tokens": 2, "outside_clip_range": 0.5}

    @pytest.mark.parametrize("form", FORMS)
    def test_inexact_attention_is_attention(self, form: str) -> None:
        model = tiny()
        task = Task.random(VOCABULARY, [5, 70, 5], [[70] * 3, [3] * 3, [2] * 3])
        with inexact(form):
            held = experience(task.rollout(task.engine(model)))
            theirs = trainer_logp(model, held)
            batches, _ = held.batches(range(held.size), 4096)
            out = Forward()(model, batches[0])
            out.logp_N.sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        ours = trainer_logp(model, held)
        out = Forward()(model, batches[0])
        out.logp_N.sum().backward()
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        torch.testing.assert_close(held.policy_logprobs, ours, rtol=0, atol=1e-4)
        for a, b in zip(gradients, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-4

    def test_a_baseline_that_is_not_used_is_no_baseline(self) -> None:
        with pytest.raises(RuntimeError, match="measures nothing"), inexact("bmm"):
            PackedContext([3])


def test_target_line() -> None:
    assert target_line("share", 0.4, {"at_least": 0.5, "met": False}) == "share 0.400, wanted at least 0.5: NOT MET"
    assert target_line("ratio", 1.1, {"at_most": 1.7, "met": True}) == "ratio 1.100, wanted at most 1.7: met"


def test_a_profile_names_the_products(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--quick", "--profile"])
    assert roofline.main() == 0
    assert "aten::mm" in capsys.readouterr().out


def test_without_a_gpu_its_benchmark_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json"])
    assert gpu.main() == 0
    assert json.loads(capsys.readouterr().out) == {"skipped": "no CUDA device"}
