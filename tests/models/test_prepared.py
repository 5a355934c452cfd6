"""The prepared pass of sampling: the bits of the decoder's modules, whatever the rows, and nothing stale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tiny_model import tiny_config
from upslope import kernels
from upslope.kernels.products import PackedWeights, Reordered
from upslope.models.attention.context import KVCache, PagedContext
from upslope.models.decoder.fast import PreparedDecoder
from upslope.models.decoder.network import Decoder

pytestmark = pytest.mark.skipif(kernels.problem() is not None, reason=f"no kernels here: {kernels.problem()}")


def decoder(dtype: torch.dtype, **changes: object) -> Decoder:
    model = Decoder(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
            if parameter.ndim == 1:
                parameter.add_(1.0)
    return model.to(dtype).eval()


def hidden(model: Decoder, packed: PackedWeights | None) -> list[Tensor]:
    """States of three sequences of unequal lengths: their prompts in one call, then two tokens each.

    Through the prepared pass where there are packed weights and it can be made of them.
    """
    prepared = None if packed is None else PreparedDecoder.of(model, packed)
    run = model if prepared is None else prepared.forward
    cache = KVCache(model.spec, 9, dtype=model.dtype)
    tables, lengths = [[4, 1], [0], [7, 3, 8]], [70, 5, 129]
    tokens = torch.randint(0, 258, (sum(lengths) + 6,), generator=torch.Generator().manual_seed(1))
    found = []
    with torch.inference_mode():
        found.append(run(tokens[: sum(lengths)], PagedContext(cache, tables, [0] * 3, lengths, packed=packed)))
        for step in range(2):
            own = tokens[sum(lengths) + 3 * step :][:3]
            starts = [n + step for n in lengths]
            found.append(run(own, PagedContext(cache, tables, starts, [1] * 3, packed=packed)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "model_type": "qwen2"},
        {"qk_norm": True, "model_type": "qwen3"},
        {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 10},
        {"hidden_size": 36, "intermediate_size": 52, "num_key_value_heads": 1},
    ],
)
def test_bits_are_those_of_the_modules(dtype: torch.dtype, changes: dict[str, object]) -> None:
    model, packed = decoder(dtype, **changes), PackedWeights()
    ours = hidden(model, packed)
    prepared = PreparedDecoder.of(model, packed)
    assert prepared is not None
    in_one_call = dtype == torch.bfloat16 and Reordered.of(torch.ones(64, 64).bfloat16()) is not None
    assert (prepared.blocks is not None) == in_one_call
    for own, plain in zip(ours, hidden(model, None), strict=True):
        assert torch.isfinite(plain).all()
        assert torch.equal(own, plain)


@pytest.mark.skipif(Reordered.of(torch.ones(64, 64).bfloat16()) is None, reason="no bfloat16 products of our own here")
def test_blocks_refuse_what_is_not_theirs() -> None:
    model, packed = decoder(torch.bfloat16), PackedWeights()
    prepared, width = PreparedDecoder.of(model, packed), model.spec.hidden_size
    assert prepared is not None
    assert prepared.blocks is not None
    cache = KVCache(model.spec, 2, dtype=torch.bfloat16)
    context = PagedContext(cache, [[0]], [0], [3], packed=packed)
    angles = model.angles(context.positions_T)
    for x in (torch.zeros(3, width), torch.zeros(3, width + 1).bfloat16()):
        with pytest.raises(ValueError, match="not of this decoder"):
            prepared.blocks.run(x, angles, cache.keys, cache.values, context.described, context.blocks)


def test_changed_weights_are_seen_after_clearing() -> None:
    model, packed = decoder(torch.bfloat16), PackedWeights()
    before = hidden(model, packed)[-1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    packed.clear()
    assert packed.bytes == 0
    after = hidden(model, packed)[-1]
    assert not torch.equal(after, before)
    assert torch.equal(after, hidden(model, None)[-1])


def test_layers_that_are_not_plain_keep_their_modules() -> None:
    adapted = decoder(torch.float32)
    projection = adapted.model.layers[1].mlp.down_proj
    adapted.model.layers[1].mlp.down_proj = torch.nn.Sequential(projection)
    packed = PackedWeights()
    assert PreparedDecoder.of(adapted, packed) is None
    assert torch.equal(hidden(adapted, packed)[-1], hidden(adapted, None)[-1])


def test_other_dtypes_keep_their_modules() -> None:
    assert PreparedDecoder.of(decoder(torch.float64), PackedWeights()) is None
