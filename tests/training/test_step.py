"""The optimizer step: one global denominator, float32 masters, nothing changed by how a batch is cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_config
from torch import Tensor, nn

from upslope.data.batching import collate, split_by_tokens
from upslope.errors import RunError
from upslope.models.attention.context import PackedContext
from upslope.models.decoder.network import Decoder
from upslope.models.protocol import ScalarHead
from upslope.training.optim import Group, MasterAdamW, decay_groups
from upslope.training.step import Forward, Outputs, accumulate, score, update
from upslope.types import Batch, Example


def examples_of(lengths: list[int], dtype: torch.dtype = torch.float64) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    total = sum(n // 2 for n in lengths)
    made = []
    for n in lengths:
        tokens = torch.randint(2, 258, (n,), generator=generator).tolist()
        mask = [False] * (n - n // 2) + [True] * (n // 2)
        advantages = torch.randn(n // 2, generator=generator, dtype=dtype)
        weight = torch.full((n // 2,), 1 / total, dtype=dtype)
        made.append(Example(tokens, mask, {"advantages": advantages, "weight": weight}))
    return made


def loss_of(batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
    policy = -out.logp_N * batch.fields["advantages"]
    return policy + 0.1 * (out.values_N - batch.fields["advantages"]).square(), {"policy": policy}


def gradients(dtype: torch.dtype, examples: list[Example], parts: list[list[int]]) -> tuple[dict[str, Tensor], float]:
    torch.manual_seed(0)
    model, head = Decoder(tiny_config()).to(dtype), ScalarHead(32)
    nn.init.normal_(head.score.weight)
    head.to(dtype)
    batches = [collate([examples[i] for i in part]) for part in parts]
    totals = accumulate(model, batches, loss_of, Forward(head=head))
    named = {**dict(model.named_parameters()), **dict(head.named_parameters())}
    return {name: p.grad for name, p in named.items() if p.grad is not None}, totals["loss"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_gradient_does_not_depend_on_the_split(dtype: torch.dtype, tolerance: float) -> None:
    examples = examples_of([4, 9, 30, 70, 12, 5, 66, 20], dtype)
    whole, value = gradients(dtype, examples, [list(range(8))])
    splits = [[[i] for i in range(8)], [[7, 1], [0, 2, 5], [3, 4, 6]], [[6, 5, 4, 3, 2, 1, 0, 7]]]
    splits.append(split_by_tokens([len(e.tokens) for e in examples], 80))
    for parts in splits:
        found, again = gradients(dtype, examples, parts)
        assert again == pytest.approx(value, rel=10 * tolerance)
        for name, g in whole.items():
            gap = torch.linalg.vector_norm(found[name] - g) / torch.linalg.vector_norm(g)
            assert float(gap) <= tolerance, (parts, name)


def test_gradient_equals_autograd_of_the_definition() -> None:
    """Mean over all trained tokens of -log p A, from full logits, one sequence at a time, in float64."""
    examples = examples_of([6, 11, 67])
    found, value = gradients(torch.float64, examples, [[0, 2], [1]])
    torch.manual_seed(0)
    model, head = Decoder(tiny_config()).double(), ScalarHead(32)
    nn.init.normal_(head.score.weight)
    head.double()
    total = torch.zeros((), dtype=torch.float64)
    count = sum(sum(e.mask) for e in examples)
    for e in examples:
        tokens = torch.tensor(e.tokens)
        hidden = model(tokens, PackedContext([len(tokens)]))
        logp = (hidden @ model.head_weight.T).log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
        mask = torch.tensor(e.mask)[1:]
        a = e.fields["advantages"]
        value_N = (hidden @ head.score.weight[0] + head.score.bias)[:-1][mask]
        total = total + (-logp[mask] * a + 0.1 * (value_N - a).square()).sum() / count
    total.backward()
    assert value == pytest.approx(float(total.detach()), rel=1e-12)
    for name, p in [*model.named_parameters(), *head.named_parameters()]:
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12)


def test_score_does_not_depend_on_packing_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, head = Decoder(tiny_config(initializer_range=0.2)).to(torch.bfloat16), ScalarHead(32)
    nn.init.normal_(head.score.weight)
    examples = examples_of([4, 9, 30, 70, 12])
    together = score(model, [collate(examples)], Forward(head=head))
    alone = score(model, [collate([e]) for e in examples], Forward(head=head))
    for name in ("logp_N", "values_N", "final_B"):
        assert torch.equal(getattr(together, name), getattr(alone, name)), name


def test_values_are_of_the_state_before_the_action() -> None:
    """The value head sees the hidden state that predicts the token, not the one that has read it."""
    torch.manual_seed(0)
    model, head = Decoder(tiny_config()), ScalarHead(32)
    nn.init.normal_(head.score.weight)
    a, b = [5, 6, 7, 8], [5, 6, 7, 200]
    mask = [False, False, True, True]
    first, second = (Forward(head=head)(model, collate([Example(t, mask)])) for t in (a, b))
    assert torch.equal(first.values_N, second.values_N)
    assert not torch.equal(first.final_B, second.final_B)


@pytest.mark.parametrize("entropy", [False, True])
def test_log_probs_are_of_the_sampling_temperature(entropy: bool) -> None:
    """Scored, and in the update with or without the entropy: log softmax(z / T) of the token, from full logits."""
    torch.manual_seed(0)
    model = Decoder(tiny_config(initializer_range=0.3)).double()
    example = examples_of([12])[0]
    tokens, mask = torch.tensor(example.tokens), torch.tensor(example.mask)
    with torch.no_grad():
        hidden = model(tokens, PackedContext([len(tokens)]))
        logp = (hidden @ model.head_weight.T / 0.6).log_softmax(-1)[:-1][mask[1:]]
    expected = logp.gather(1, tokens[mask][:, None])[:, 0]
    seen: dict[str, Tensor] = {}

    def loss(batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        seen["logp"] = out.logp_N.detach()
        if "entropy_N" in out:
            seen["entropy"] = out.entropy_N.detach()
        return -out.logp_N, {}

    accumulate(model, [collate([example])], loss, Forward(temperature=0.6, entropy=entropy))
    torch.testing.assert_close(seen["logp"], expected)
    if entropy:
        torch.testing.assert_close(seen["entropy"], -(logp.exp() * logp).sum(-1))
    scored = score(model, [collate([example])], Forward(temperature=0.6)).logp_N
    torch.testing.assert_close(scored, expected)


def test_the_value_loss_moves_the_trunk_only_where_it_may() -> None:
    """detach_trunk keeps it to the head; the value after the last token is a constant unless train_final."""
    torch.manual_seed(0)
    model, head = Decoder(tiny_config()), ScalarHead(32)
    nn.init.normal_(head.score.weight)
    batch = collate(examples_of([8, 9], torch.float32))

    def moved(what: str, **options: bool) -> tuple[bool, bool]:
        model.zero_grad()
        head.zero_grad()
        getattr(Forward(head=head, **options)(model, batch), what).sum().backward()
        return tuple(p.grad is not None and bool(p.grad.any()) for p in (model.model.norm.weight, head.score.weight))  # type: ignore[return-value]

    assert moved("values_N") == (True, True)
    assert moved("values_N", detach_trunk=True) == (False, True)
    assert moved("final_B") == (False, True)
    assert moved("final_B", train_final=True) == (True, True)


def test_scoring_knows_no_dropout_and_training_has_it_back() -> None:
    class Noisy(Decoder):
        def forward(self, tokens_T: Tensor, context: Any) -> Tensor:
            return nn.functional.dropout(super().forward(tokens_T, context), 0.5, self.training)

    torch.manual_seed(0)
    model = Noisy(tiny_config(initializer_range=0.3)).train()
    batch = collate(examples_of([8, 9], torch.float32))
    one, other = (score(model, [batch]).logp_N for _ in range(2))
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)
    assert model.training
    assert model.model.norm.training
    noisy, again = (Forward()(model, batch).logp_N for _ in range(2))
    assert noisy is not None
    assert again is not None
    assert not torch.equal(noisy, again)
    model.eval()
    score(model, [batch])
    assert not model.training


def quadratic() -> tuple[nn.Parameter, MasterAdamW]:
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    return p, MasterAdamW([Group({"p": p}, weight_decay=0.1)])


def test_adamw_by_hand_on_a_master() -> None:
    """One step from w: w (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps) = w (1 - lr wd) - lr sign(g) nearly."""
    p, optimizer = quadratic()
    (p.float() * torch.tensor([3.0, -0.5])).sum().backward()
    assert p.grad is None
    norm = optimizer.step(0.01, max_norm=0.0)
    assert norm == pytest.approx((9 + 0.25) ** 0.5)
    expected = torch.tensor([1.0, -2.0]) * (1 - 0.001) - 0.01 * torch.tensor([3.0, -0.5]) / (
        torch.tensor([3.0, 0.5]) + 1e-8
    )
    torch.testing.assert_close(optimizer.weights()["p"], expected)
    assert torch.equal(p.detach(), expected.bfloat16())


def test_updates_too_small_for_bfloat16_add_up_in_the_master() -> None:
    p, optimizer = quadratic()
    start = p.detach().clone()
    for _ in range(3):
        (p.float() * torch.tensor([1.0, 1.0])).sum().backward()
        optimizer.step(1e-5, max_norm=0.0)
    assert torch.equal(p.detach(), start)
    assert float((optimizer.weights()["p"] - start.float()).abs().min()) > 2e-5


def test_clipping_is_of_the_accumulated_gradient() -> None:
    p = nn.Parameter(torch.zeros(2))
    optimizer = MasterAdamW([Group({"p": p})])
    (p * torch.tensor([3.0, 0.0])).sum().backward()
    (p * torch.tensor([0.0, 4.0])).sum().backward()
    seen: dict[str, Tensor] = {}
    original = optimizer._adamw.step
    optimizer._adamw.step = lambda: (seen.update({k: g.clone() for k, g in optimizer.gradients().items()}), original())[
        1
    ]
    assert optimizer.step(0.1, max_norm=1.0) == pytest.approx(5.0)
    torch.testing.assert_close(seen["p"], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_changes_nothing(bad: float) -> None:
    p, optimizer = quadratic()
    before = optimizer.weights()["p"].clone()
    (p.float() * torch.tensor([bad, 1.0])).sum().backward()
    with pytest.raises(RunError, match="not finite"):
        optimizer.step(0.1, max_norm=1.0)
    assert torch.equal(optimizer.weights()["p"], before)


def test_a_norm_beyond_float32_changes_nothing() -> None:
    p, optimizer = quadratic()
    before = optimizer.weights()["p"].clone()
    (p.float() * torch.tensor([3e38, 3e38])).sum().backward()  # each of them is finite
    with pytest.raises(RunError, match="norm is beyond float32"):
        optimizer.step(0.1, max_norm=1.0)
    assert torch.equal(optimizer.weights()["p"], before)


def test_non_finite_loss_stops_before_the_update() -> None:
    model = Decoder(tiny_config())
    optimizer = MasterAdamW(decay_groups(model.named_parameters(), weight_decay=0.0))
    before = {name: w.clone() for name, w in optimizer.weights().items()}

    def broken(batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        return out.logp_N * float("nan"), {}

    batch = collate(examples_of([8, 9], torch.float32))
    with pytest.raises(RunError, match="stopped before the update"):
        update(model, optimizer, [batch], broken, learning_rate=0.1, max_grad_norm=1.0)
    assert all(torch.equal(w, before[name]) for name, w in optimizer.weights().items())
    assert not optimizer.gradients()


def test_decay_spares_vectors_and_frozen_parameters() -> None:
    model = Decoder(tiny_config(model_type="qwen2", attention_bias=True))
    model.model.embed_tokens.weight.requires_grad_(False)
    groups = decay_groups(model.named_parameters(), weight_decay=0.1)
    decayed, spared = groups
    assert decayed.weight_decay == 0.1
    assert spared.weight_decay == 0.0
    assert all(p.dim() == 2 for p in decayed.parameters.values())
    assert all(p.dim() == 1 for p in spared.parameters.values())
    assert "model.embed_tokens.weight" not in decayed.parameters


@given(st.integers(1, 5), st.integers(0, 3))
def test_optimizer_state_survives_a_checkpoint(before: int, after: int) -> None:
    def fresh() -> tuple[nn.Parameter, MasterAdamW]:
        return quadratic()

    def go(p: nn.Parameter, optimizer: MasterAdamW, steps: int) -> None:
        for _ in range(steps):
            (p.float().square() * torch.tensor([1.0, 3.0])).sum().backward()
            optimizer.step(0.01, max_norm=1.0)

    p, straight = fresh()
    go(p, straight, before)
    weights = {k: v.clone() for k, v in straight.weights().items()}
    state = {k: v.clone() for k, v in straight.state().items()}
    go(p, straight, after)
    q, resumed = fresh()
    resumed.load(weights, state)
    go(q, resumed, after)
    assert torch.equal(straight.weights()["p"], resumed.weights()["p"])
    assert all(torch.equal(v, resumed.state()[k]) for k, v in straight.state().items())
