"""Captured decoding steps, with a recorder that runs the work again: the buffers, the rounding, the spare block."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from upslope.engine import Engine, runner
from upslope.engine.runner import DecodeGraphs, can_capture, rounded_rows
from upslope.models.attention import context as attention_contexts
from upslope.types import Completion, SamplingParams

from .tiny import prompt, tiny, trainer_logprobs

LENGTHS = (1, 40, 63, 64, 65, 130)


def attention(
    q_THd: Tensor, keys: Tensor, values: Tensor, tables_SB: Tensor, tiles_n4: Tensor, *, scale: float, longest: int
) -> Tensor:
    """What the GPU's kernel computes, tile by tile."""
    out = torch.full_like(q_THd, torch.nan)
    group = q_THd.shape[1] // keys.shape[1]
    for sequence, row, start, count in tiles_n4.tolist():
        assert count <= longest
        table = tables_SB[sequence, : -(-(start + count) // keys.shape[2])].long()
        k, v = (x[table].transpose(0, 1).flatten(1, 2).repeat_interleave(group, 0) for x in (keys, values))
        for i in range(count):
            seen = start + i + 1
            score = torch.einsum("hd,hsd->hs", q_THd[row + i], k[:, :seen]) * scale
            out[row + i] = torch.einsum("hs,hsd->hd", score.softmax(-1), v[:, :seen])
    return out


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Steps are captured as on a GPU; where the results of the graphs lie, in the order of their making."""
    module = ModuleType("upslope.kernels.paged_triton")
    module.paged_attention_gpu = attention  # type: ignore[attr-defined]
    module.tile_tokens = lambda heads, kv_heads: 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    results: list[Tensor] = []

    def record(work: Callable[[], Tensor], pool: object) -> tuple[Callable[[], None], Tensor]:
        results.append(work())
        place = len(results) - 1

        def replay() -> None:
            results[place].copy_(work())

        return replay, results[place]

    monkeypatch.setattr(runner, "can_capture", lambda model: model.captures)
    monkeypatch.setattr(runner, "DecodeGraphs", lambda *args: DecodeGraphs(*args, record=record))
    return results


def outcome(groups: list[list[Completion]]) -> tuple[list[list[int]], Tensor]:
    every = [c for group in groups for c in group]
    return [c.tokens for c in every], torch.tensor([x for c in every for x in c.policy_logprobs], dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"prefill_tokens": 17, "max_batch": 5}, {"num_blocks": 5, "max_batch": 7}])
@pytest.mark.parametrize("shape", ["grouped", "biased", "normed"])
def test_the_same_completions_as_without(shape: str, options: dict[str, int], request: pytest.FixtureRequest) -> None:
    model = tiny(shape, torch.float64)
    prompts, params = [prompt(n) for n in LENGTHS], SamplingParams(max_tokens=40, n=3, seed=5)
    options = {"num_blocks": 80, **options}
    expected = Engine(model, **options).generate(prompts, params)
    results: list[Tensor] = request.getfixturevalue("recorded")
    engine = Engine(model, **options)
    found = engine.generate(prompts, params)
    assert outcome(found)[0] == outcome(expected)[0]
    torch.testing.assert_close(outcome(found)[1], outcome(expected)[1], rtol=1e-9, atol=1e-9)
    assert results
    assert len(results) == len({len(x) for x in results}), "a number of rows is captured once"
    assert all(len(x) == rounded_rows(len(x)) for x in results)
    assert engine.stats.preemptions > 0 or options["num_blocks"] == 80


def test_the_whole_way_of_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and what follows through the block cache's kernel, scoring through flex_attention: the same numbers."""
    model = tiny("grouped", torch.float64)
    prompts, params = [prompt(n) for n in LENGTHS], SamplingParams(max_tokens=20, n=2, seed=3)
    expected = Engine(model, num_blocks=80).generate(prompts, params)
    request.getfixturevalue("recorded")
    calls: list[Tensor] = []

    def fused(x: Tensor) -> bool:
        calls.append(x)
        return True

    monkeypatch.setattr(attention_contexts, "fused_on", fused)
    found = Engine(model, num_blocks=80, prefill_tokens=100).generate(prompts, params)
    assert calls
    assert outcome(found)[0] == outcome(expected)[0]
    torch.testing.assert_close(outcome(found)[1], outcome(expected)[1], rtol=1e-9, atol=1e-9)
    calls.clear()
    pairs = [(p, c.tokens) for p, group in zip(prompts, found, strict=True) for c in group]
    scored = torch.tensor([x for one in trainer_logprobs(model, pairs) for x in one], dtype=torch.float64)
    assert calls
    torch.testing.assert_close(scored, outcome(expected)[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("change", [lambda engine: engine.set_version(1), lambda engine: engine.sleep()])
def test_new_weights_are_captured_anew(change: Callable[[Engine], None], recorded: list[Tensor]) -> None:
    model, params = tiny("grouped", torch.float64), SamplingParams(max_tokens=5, n=2)
    engine = Engine(model, num_blocks=20)
    engine.generate([prompt(9)], params)
    before = len(recorded)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(
            model.model.layers[0].mlp.down_proj.weight * -2.0
        )
    change(engine)
    found = engine.generate([prompt(9)], params)
    assert len(recorded) == 2 * before
    assert outcome(found)[0] == outcome(Engine(model, num_blocks=20).generate([prompt(9)], params))[0]


def test_rounded_rows() -> None:
    assert [rounded_rows(n) for n in (1, 2, 3, 5, 9, 16, 17, 32, 33, 64)] == [1, 2, 4, 8, 16, 16, 32, 32, 48, 64]


def test_nothing_is_captured_on_a_processor() -> None:
    assert not can_capture(tiny("grouped"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    """Greedy completions in float32 with graphs and without: the same tokens, log-probs to 1e-4."""
    model = tiny("grouped").cuda()
    assert can_capture(model)
    prompts, params = [prompt(n) for n in LENGTHS], SamplingParams(max_tokens=40, temperature=0.0)
    found = Engine(model, num_blocks=80).generate(prompts, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "can_capture", lambda model: False)
        expected = Engine(model, num_blocks=80).generate(prompts, params)
    assert outcome(found)[0] == outcome(expected)[0]
    torch.testing.assert_close(outcome(found)[1], outcome(expected)[1], rtol=0, atol=1e-4)
