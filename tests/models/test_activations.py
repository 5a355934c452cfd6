"""Activations kept from sampling: the update that starts from them has the bits of the one that computes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.models.test_prepared import decoder
from upslope import kernels
from upslope.data.batching import collate
from upslope.engine.engine import Engine
from upslope.models.decoder.fast import Activations, bytes_per_token
from upslope.models.decoder.network import Decoder
from upslope.training.step import Forward
from upslope.types import Batch, Example, SamplingParams

pytestmark = pytest.mark.skipif(kernels.problem() is not None, reason=f"no kernels here: {kernels.problem()}")

PROMPTS = [[5, 6, 7, 8, 9], list(range(20, 95)), [5, 6, 7], list(range(20, 90))]


def room(model: Decoder, tokens: int = 2000) -> Activations:
    made = Activations.of(model, tokens=tokens, limit_bytes=10**9)
    assert made is not None
    return made


def sampled(
    model: Decoder, store: Activations, *, prompts: list[list[int]] = PROMPTS, samples: int = 3, **options: int
) -> list[Example]:
    """Completions of up to 40 tokens as training sequences."""
    engine = Engine(model, **{"num_blocks": 60, **options})
    params = [SamplingParams(max_tokens=n, n=samples, ignore_eos=True, seed=3) for n in (40, 7, 1, 20)[: len(prompts)]]
    with engine.keeping(store):
        found = engine.generate(prompts, params)
    assert engine.runner.activations is None
    return [
        Example([*prompt, *c.tokens], [False] * len(prompt) + [True] * len(c.tokens))
        for prompt, group in zip(prompts, found, strict=True)
        for c in group
    ]


def gradients(model: Decoder, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and every parameter's gradient of a weighted sum of them."""
    model.zero_grad()
    out = Forward()(model, batch)
    (out.logp_N * torch.linspace(-1, 2, out.logp_N.shape[0])).sum().backward()
    return out.logp_N.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_update(model: Decoder, batch: Batch) -> None:
    assert batch.replay is not None
    ours = gradients(model, batch)
    batch.replay = None
    theirs = gradients(model, batch)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys() == dict(model.named_parameters()).keys()
    for name, gradient in theirs[1].items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(ours[1][name], gradient), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "model_type": "qwen2", "tie_word_embeddings": False},
        {"hidden_size": 36, "intermediate_size": 52, "num_key_value_heads": 1},
        {"num_hidden_layers": 1, "head_dim": 10},
    ],
)
@pytest.mark.parametrize("share", [True, False])
def test_gradients_are_those_after_a_forward_pass(dtype: torch.dtype, changes: dict[str, object], share: bool) -> None:
    model = decoder(dtype, **changes)
    store = room(model)
    batch = collate(sampled(model, store), share_prompts=share, feed_last=False)
    assert store.attach(batch)
    assert_same_update(model, batch)


def test_prefill_in_chunks_and_preemption_leave_the_same() -> None:
    model = decoder(torch.bfloat16)
    store = room(model, 20_000)
    batch = collate(sampled(model, store, num_blocks=6, prefill_tokens=13), share_prompts=True, feed_last=False)
    assert store.attach(batch)
    assert_same_update(model, batch)


def test_without_a_gradient_the_states_are_looked_up() -> None:
    model = decoder(torch.bfloat16)
    store = room(model)
    batch = collate(sampled(model, store), share_prompts=True, feed_last=False)
    plain = Forward()(model, batch).logp_N
    assert store.attach(batch)
    with torch.no_grad():
        kept = Forward()(model, batch).logp_N
    assert plain is not None
    assert kept is not None
    assert torch.equal(plain.detach(), kept)


def test_another_network_computes_for_itself() -> None:
    model, other = decoder(torch.float32), decoder(torch.float32)
    store = room(model)
    batch = collate(sampled(model, store), share_prompts=True, feed_last=False)
    alone = gradients(other, batch)[1]
    assert store.attach(batch)
    for name, gradient in gradients(other, batch)[1].items():
        assert torch.equal(gradient, alone[name])


class TestWhatIsNotThereIsComputed:
    def test_a_sequence_that_was_not_sampled(self) -> None:
        model = decoder(torch.float32)
        store = room(model)
        examples = sampled(model, store)
        examples[2].tokens[-2] += 1
        batch = collate(examples, share_prompts=True, feed_last=False)
        assert not store.attach(batch)
        assert batch.replay is None

    def test_a_last_token_that_was_not_fed(self) -> None:
        model = decoder(torch.float32)
        store = room(model)
        assert not store.attach(collate(sampled(model, store), share_prompts=True))

    def test_after_clear(self) -> None:
        model = decoder(torch.float32)
        store = room(model)
        batch = collate(sampled(model, store), share_prompts=True, feed_last=False)
        store.clear()
        assert not store.attach(batch)

    def test_no_room(self) -> None:
        model = decoder(torch.float32)
        store = room(model, 230)  # enough for what ends after 7 tokens
        examples = sampled(model, store)
        assert store.full
        batches = [collate([e], feed_last=False) for e in examples]
        attached = [store.attach(batch) for batch in batches]
        assert any(attached)
        assert not all(attached)
        store.clear()
        assert not store.full

    def test_too_few_rows_for_the_same_products(self) -> None:
        model = decoder(torch.float32)
        store = room(model)
        batch = collate([Example([5, 6, 7, 8, 9], [False] * 4 + [True])], feed_last=False)
        assert not store.attach(batch)


def test_a_prefix_is_not_taken_from_the_cache_while_keeping() -> None:
    model = decoder(torch.float32)
    store = room(model)
    prompts = [list(range(80)), [*range(80), 7, 8]]  # the second one begins like the first, and waits for it
    examples = sampled(model, store, prompts=prompts, max_batch=3)
    batch = collate(examples, share_prompts=True, feed_last=False)
    assert store.attach(batch)
    assert_same_update(model, batch)


def test_networks_that_cannot_be_replayed() -> None:
    for changes in ({"qk_norm": True, "model_type": "qwen3"}, {"output_bias": True}):
        assert Activations.of(decoder(torch.float32, **changes), tokens=10, limit_bytes=10**9) is None
    adapted = decoder(torch.float32)
    adapted.model.layers[0].mlp.down_proj = nn.Sequential(adapted.model.layers[0].mlp.down_proj)
    assert Activations.of(adapted, tokens=10, limit_bytes=10**9) is None
    assert Activations.of(decoder(torch.float64), tokens=10, limit_bytes=10**9) is None


def test_memory_is_what_is_said() -> None:
    model = decoder(torch.bfloat16)
    each = bytes_per_token(model.config, model.dtype)
    # 2 layers of 4 query and 2 key heads of width 8, width 32, feed-forward 48; the log-sum-exps in float32
    assert each == 2 * (2 * (64 + 32 + 32 + 96 + 32) + 4 * 4)
    store = Activations.of(model, tokens=1000, limit_bytes=100 * each + 1)
    assert store is not None
    assert store.capacity == 100
    tensors = store.kept[:-1]
    assert sum(x.numel() * x.element_size() for x in tensors) == 100 * each
    assert Activations.of(model, tokens=1000, limit_bytes=each - 1) is None
