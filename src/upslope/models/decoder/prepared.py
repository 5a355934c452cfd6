"""The decoder's pass over new tokens of cached sequences, with all that stays the same from step to step prepared.

The same kernels and products in the same order as in network.py, so the same bits. With a few rows the way through
modules costs as much time as the arithmetic: where all products are the kernels' own (bfloat16), the blocks are one
call; elsewhere there is one call between two products.

Shapes: T rows, D width, F feed-forward width, H query heads, K key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from upslope.kernels import usable
from upslope.kernels.decoder import BlockWeights, DecoderBlocks, DecoderShape
from upslope.kernels.products import Reordered
from upslope.kernels.rows import norm_into, swiglu_into
from upslope.models.attention.context import PagedContext
from upslope.models.decoder.joined import joined
from upslope.models.packed import PackedWeights

if TYPE_CHECKING:
    from upslope.models.decoder.network import Decoder

__all__ = ["PreparedDecoder"]

Product = Callable[[Tensor], Tensor]


class _Layer(NamedTuple):
    """One block: what it multiplies with, and the weights of its norms."""

    first_norm: Tensor
    second_norm: Tensor
    head_norms: tuple[Tensor, Tensor] | None
    attend: Product
    out: Product
    widen: Product
    narrow: Product


class PreparedDecoder:
    """A decoder's layers as products and norm weights; valid until its weights change or `PackedWeights.clear`.

    any_rows: a row's bits are the same whatever the number of rows; without it `forward` wants its rows padded.
    """

    def __init__(self, decoder: Decoder, layers: list[_Layer], blocks: DecoderBlocks | None) -> None:
        self.any_rows, self.blocks = blocks is not None, blocks
        config = decoder.config
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.intermediate, self.eps = config.intermediate_size, config.rms_norm_eps
        self.layers, self.last_norm = layers, decoder.model.norm.weight.detach()

    @classmethod
    def of(cls, decoder: Decoder, packed: PackedWeights) -> PreparedDecoder | None:
        """The decoder prepared, or None where its layers are not plain (adapters) or the kernels cannot run them."""
        config = decoder.config
        if config.head_dim % 2 or not usable(decoder.model.norm.weight, decoder.head_weight):
            return None
        layers, blocks = [], []
        for layer in decoder.model.layers:
            a, m = layer.self_attn, layer.mlp
            groups = (a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (m.gate_proj, m.up_proj), (m.down_proj,)
            found = [whole for group in groups if (whole := joined(*group)) is not None]
            if len(found) < len(groups):
                return None
            heads = (a.q_norm.weight.detach(), a.k_norm.weight.detach()) if config.qk_norm else None
            norms = layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach(), heads
            layers.append(_Layer(*norms, *(packed.product(*one) for one in found)))
            copies = [(copy, bias) for weight, bias in found if isinstance(copy := packed.copy(weight), Reordered)]
            if len(copies) == len(found):
                blocks.append(BlockWeights(*norms, *copies))
        shape = DecoderShape(
            width=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
        )
        whole = len(blocks) == len(layers)
        last_norm = decoder.model.norm.weight.detach()
        return cls(decoder, layers, DecoderBlocks(shape, blocks, last_norm) if whole else None)

    @torch.no_grad()
    def forward(self, x_TD: Tensor, real: int, cos_Td: Tensor, sin_Td: Tensor, context: PagedContext) -> Tensor:
        """Normed hidden states [T, D] of embedded tokens x (overwritten), of which the first `real` rows are tokens."""
        if self.blocks is not None:
            return context.through(self.blocks, x_TD, (cos_Td, sin_Td))
        rows = x_TD.shape[0]
        x, normed, scales = x_TD, torch.empty_like(x_TD), torch.empty(rows, dtype=torch.float32)
        q, k, v = (x.new_empty(real, n, self.head_dim) for n in (self.heads, self.kv_heads, self.kv_heads))
        out, gated = x.new_zeros(rows, self.heads * self.head_dim), x.new_empty(rows, self.intermediate)
        how: dict[str, Any] = {
            "qkv": (q, k, v),
            "angles": (cos_Td, sin_Td),
            "scale": self.head_dim**-0.5,
            "eps": self.eps,
        }
        kept, delta = context.kept, None
        for number, layer in enumerate(self.layers):
            norm_into(x, delta, layer.first_norm, x, normed, scales, self.eps)
            everything = layer.attend(normed)
            if kept is not None:
                if number:
                    kept.part(kept.store.ends, number - 1).copy_(x[:real])
                kept.part(kept.store.products, number).copy_(everything[:real])
                how["lse_TH"] = kept.part(kept.store.lse, number)
            context.step(number, everything, out, norms=layer.head_norms, **how)
            norm_into(x, layer.out(out), layer.second_norm, x, normed, scales, self.eps)
            both = layer.widen(normed)
            if kept is not None:
                kept.part(kept.store.attended, number).copy_(out[:real])
                kept.part(kept.store.middle, number).copy_(x[:real])
                kept.part(kept.store.gates, number).copy_(both[:real])
            swiglu_into(both, gated)
            delta = layer.narrow(gated)
        norm_into(x, delta, self.last_norm, x, normed, scales, self.eps)
        if kept is not None:
            kept.part(kept.store.ends, len(self.layers) - 1).copy_(x[:real])
        return normed
