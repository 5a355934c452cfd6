"""Dropout of what adapters read: a share p of the numbers, by a counter that knows neither batch nor packing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_kit import tiny_encoder
from tiny_model import tiny_config
from tiny_seq2seq import tiny as tiny_seq2seq
from torch import Tensor, nn

from upslope.data.batching import collate
from upslope.errors import ConfigError, ModelError
from upslope.models.decoder.network import Decoder
from upslope.models.encoder.items import Input, item_logits, keys_of
from upslope.models.encoder.items import padded_batch as pad
from upslope.models.lora import AdapterDropout, add_adapters, drop_inputs, dropping, packed_keys
from upslope.training.step import Forward
from upslope.types import Batch, Example


def masks(p: float, *, seed: int = 0, layer: int = 0, shape: tuple[int, int] = (200, 1001)) -> Tensor:
    """What becomes of ones."""
    module = AdapterDropout(p, seed, layer)
    module.keys = torch.arange(shape[0])
    return module(torch.ones(shape, dtype=torch.float64))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_a_share_p_is_dropped_and_the_rest_scaled(p: float) -> None:
    """Within five standard deviations: of all, of every channel, of every row, and for neighbours alike."""
    found = masks(p)
    dropped = (found == 0).double()
    assert torch.allclose(found[found != 0], torch.tensor(1 / (1 - p), dtype=torch.float64), rtol=1e-3)
    for share, n in ((dropped.mean(), dropped.numel()), (dropped.mean(0), 200), (dropped.mean(1), 1001)):
        assert ((share - p).abs() < 5 * (p * (1 - p) / n) ** 0.5).all()
    for a, b in ((dropped[:, 1:], dropped[:, :-1]), (dropped[1:], dropped[:-1]), (dropped[:, 4:], dropped[:, :-4])):
        assert abs(float(((a - p) * (b - p)).mean())) < 5 * p * (1 - p) / a.numel() ** 0.5


def test_seeds_and_layers_drop_others() -> None:
    found = [masks(0.5), masks(0.5, seed=1), masks(0.5, layer=1), masks(0.5, seed=1, layer=1)]
    for i, a in enumerate(found):
        for b in found[:i]:
            assert float(((a == 0) == (b == 0)).double().mean()) == pytest.approx(0.5, abs=0.01)


def decoder(dropout: float = 0.5, **changes: Any) -> Decoder:
    """With adapters whose second factor is not 0."""
    torch.manual_seed(0)
    model = Decoder(tiny_config(), **changes).double()
    add_adapters(model, Path("start"), rank=4, alpha=8, targets=(), seed=3, dropout=dropout)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
    return model.double().train()


@contextmanager
def dropped(model: nn.Module, batch: Batch, step: int = 0) -> Iterator[None]:
    with dropping(model, [batch], packed_keys, step) as prepared:
        for _ in prepared:
            yield


def logps(model: Decoder, batch: Batch, step: int = 0) -> Tensor:
    with dropped(model, batch, step):
        found = Forward()(model, batch).logp_N
    assert found is not None
    return found.detach()


def example(tokens: list[int], prompt: int = 2) -> Example:
    return Example(tokens, [t >= prompt for t in range(len(tokens))])


A, B, C = example([5, 6, 7, 8, 9]), example([5, 6, 9, 9, 9, 9, 3]), example([5, 6, 7, 1])


def test_only_what_the_adapter_reads_is_dropped() -> None:
    """Every layer gives W x + scale B A drop(x), with the mask of its own place."""
    model, batch = decoder(), collate([A, B])
    x = torch.randn(len(batch.tokens_T), 32, dtype=torch.float64)
    layer: Any = model.get_submodule("model.layers.1.self_attn.q_proj")
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with dropped(model, batch, step=2):
        masked = layer.lora_dropout["default"](x)
        found = layer(x)
    assert 0.3 < float((masked == 0).double().mean()) < 0.7
    assert torch.allclose(found, x @ layer.base_layer.weight.t() + 2 * masked @ down.t() @ up.t(), atol=1e-12)
    assert torch.allclose(layer(x), x @ layer.base_layer.weight.t() + 2 * x @ down.t() @ up.t(), atol=1e-12)


def test_over_many_steps_the_mean_is_the_layer_without() -> None:
    model, batch = decoder(0.3), collate([A])
    x = torch.randn(len(batch.tokens_T), 32, dtype=torch.float64)
    layer: Any = model.get_submodule("model.layers.0.self_attn.v_proj")
    with torch.no_grad():
        found = []
        for step in range(2000):
            with dropped(model, batch, step):
                found.append(layer(x))
        values = torch.stack(found)
        error = (values.mean(0) - layer(x)).abs() / (values.std(0) / 2000**0.5)
    assert float(error.max()) < 5
    assert float(error.mean()) < 1


def test_a_tokens_mask_knows_its_past_and_not_its_batch() -> None:
    """Alone, packed in any order, behind a shared prompt; another step has another."""
    model = decoder()
    alone = [logps(model, collate([e])) for e in (A, B, C)]
    for batch, order in (
        (collate([A, B, C]), (0, 1, 2)),
        (collate([C, A, B]), (2, 0, 1)),
        (collate([B, A, C], share_prompts=True), (1, 0, 2)),
        (collate([A, B], feed_last=False), (0, 1)),
    ):
        assert torch.allclose(logps(model, batch), torch.cat([alone[i] for i in order]), atol=1e-12)
    assert max(collate([A, B], share_prompts=True).parents) == 0
    assert torch.allclose(alone[0][:1], alone[2][:1], atol=1e-12)
    assert not torch.allclose(logps(model, collate([A]), step=1), alone[0])


def test_recomputed_activations_have_the_same_mask() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, batch = decoder(gradient_checkpointing=checkpointing), collate([A, B])
        with dropped(model, batch, step=4):
            found = Forward()(model, batch).logp_N
            assert found is not None
            found.sum().backward()
        gradients.append([p.grad for _, p in model.named_parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_none_without_it_and_none_outside() -> None:
    """0 leaves peft's own layers; what is not inside `dropping`, and a step of None, has every number."""
    batch, none = collate([A, B]), decoder(0.0)
    assert not [m for m in none.modules() if isinstance(m, AdapterDropout)]
    plain, model = Forward()(none, batch).logp_N, decoder()
    with pytest.raises(KeyError), dropped(model, batch):
        raise KeyError
    for found in (Forward()(model, batch).logp_N, logps(model, batch, step=None)):  # type: ignore[arg-type]
        assert plain is not None
        assert found is not None
        assert torch.equal(found, plain)
    assert not torch.allclose(logps(model, batch), plain)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "xlnet"])
def test_a_text_of_an_encoder_is_masked_alike_in_any_batch(kind: str) -> None:
    """Padded on either side; the first token, which all texts share, is masked as its own text says."""
    encoder = tiny_encoder("classify", kind, labels=["a", "b"])
    encoder.add_adapters(4, alpha=8, seed=0, dropout=0.5)
    for name, p in encoder.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(p)
    texts = [Input([2, 40, 41, 3], [0], []), Input([2, 30, 31, 32, 33, 34, 35, 3], [0], []), Input([2, 7, 3], [0], [])]

    def logits(*inputs: Input, step: int | None = 0) -> Tensor:
        batch = pad(inputs, encoder, 0 if kind != "roberta" else 1)
        with dropping(encoder, [batch], partial(keys_of, encoder), step) as prepared, torch.no_grad():
            return torch.cat([item_logits(encoder, one) for one in prepared])

    alone = torch.cat([logits(text) for text in texts])
    assert torch.allclose(logits(*texts), alone, atol=1e-5)
    assert not torch.allclose(alone, logits(*texts, step=1), atol=1e-3)
    assert not torch.allclose(alone, logits(*texts, step=None), atol=1e-3)
    keys = keys_of(encoder, pad(texts, encoder, 0))
    assert len(set((keys.t() if kind == "xlnet" else keys)[:, -1 if kind == "xlnet" else 0].tolist())) == 3


def test_rows_that_are_not_the_tokens_are_refused() -> None:
    module = AdapterDropout(0.5, 0, 0)
    module.keys = torch.arange(6)
    assert module(torch.ones(8, 5)).shape == (8, 5)
    for shape in ((5, 4), (2, 4, 3)):
        with pytest.raises(ModelError, match=r"lora_dropout: .* rows of 6 tokens; set it to 0, or name other layers"):
            module(torch.ones(shape))
    with pytest.raises(ConfigError, match=r"lora_dropout: .*encoder-decoder"):
        add_adapters(tiny_seq2seq(), Path("x"), rank=2, alpha=4, targets=(), seed=0, dropout=0.1)


def test_every_adapter_has_its_own() -> None:
    model = decoder()
    own = [m.own for m in model.modules() if isinstance(m, AdapterDropout)]
    assert len(set(own)) == len(own) == 14
    drop_inputs(model, 0.5, 4)
    assert not set(own) & {m.own for m in model.modules() if isinstance(m, AdapterDropout)}
