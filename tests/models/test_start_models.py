"""What a run makes of its start model: the adapters' scale, the reference beside or inside the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_folder
from torch import Tensor

from upslope.build import load_policy, load_reference
from upslope.data.batching import collate
from upslope.models.attention.context import PackedContext
from upslope.models.files.loading import load_model
from upslope.models.protocol import CausalModel
from upslope.options import PPOOptions
from upslope.training.step import score
from upslope.types import Example

TOKENS, ROWS = 258, 270


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 12 rows of its head behind the tokenizer's last token."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "wide", vocab_size=ROWS, tie_word_embeddings=False)


def options(folder: Path, **changes: Any) -> PPOOptions:
    return PPOOptions(**{"model": str(folder), "dtype": "float32", **changes})


def hidden(model: CausalModel) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25), PackedContext([20]))


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (6.0, 1.5)])
def test_adapters_add_alpha_over_rank_and_the_reference_is_without_them(
    alpha: float | None, scale: float, folder: Path
) -> None:
    """W + (alpha / r) B A of every adapted layer; without lora_alpha it is twice the rank."""
    policy = load_policy(options(folder, lora_rank=4, lora_alpha=alpha))
    named = dict(policy.model.named_parameters())
    changed = [name for name in named if "lora_B" in name]
    assert len(changed) == 14, "seven products in each of two layers"
    torch.manual_seed(1)
    for name in changed:
        torch.nn.init.normal_(named[name], std=0.1)
    start, merged = load_model(folder), load_model(folder)
    weights = dict(merged.named_parameters())
    with torch.no_grad():
        for name in changed:
            product = named[name] @ named[name.replace("lora_B", "lora_A")]
            weights[name.replace(".lora_B.default", "")] += scale * product
    torch.testing.assert_close(hidden(policy.model), hidden(merged), rtol=1e-5, atol=1e-5)
    assert float((hidden(policy.model) - hidden(start)).abs().max()) > 0.01
    adapted = hidden(policy.model)
    with policy.as_reference() as reference:
        assert torch.equal(hidden(reference), hidden(start))
    assert torch.equal(hidden(policy.model), adapted), "the adapters are on again"


def test_the_reference_has_the_policys_own_tokens_and_does_not_move(folder: Path) -> None:
    """Before the first update their log-probs are the same bits; afterwards the reference's are what they were."""
    policy = load_policy(options(folder))
    reference = load_reference(policy, options(folder))
    assert reference is not None
    assert len(reference.output_weight) == ROWS
    batch = collate([Example(list(range(5, 25)), [False] * 5 + [True] * 15)])

    def logp(model: CausalModel) -> Tensor:
        found = score(model, [batch]).logp_N
        assert found is not None
        return found

    before = logp(reference)
    assert torch.equal(logp(policy.model), before)
    with torch.no_grad():
        logits = load_model(folder).logits(hidden(reference))[:, :TOKENS]
    own = logits.log_softmax(-1)[4:19].gather(1, torch.arange(10, 25)[:, None])[:, 0]
    torch.testing.assert_close(before, own)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(logp(reference), before)
    assert not torch.equal(logp(policy.model), before)
    assert not any(p.requires_grad for p in reference.parameters())


def test_the_seed_draws_the_adapters(folder: Path) -> None:
    """They start as nothing (B is 0), and A is another for another seed."""

    def first(seed: int) -> dict[str, Tensor]:
        named = load_policy(options(folder, lora_rank=2, seed=seed)).model.named_parameters()
        return {name: p.detach() for name, p in named if p.requires_grad}

    one, same, other = first(3), first(3), first(4)
    assert all(torch.equal(x, same[name]) for name, x in one.items())
    for name, x in one.items():
        assert bool(x.any()) == ("lora_A" in name)
        assert torch.equal(x, other[name]) == ("lora_B" in name)
