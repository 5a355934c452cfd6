"""The decoder's pass over new tokens of cached sequences, with all that stays the same from step to step prepared.

The same kernels and products in the same order as in network.py, so the same bits. With a few rows the way through
modules costs as much time as the arithmetic: where all products are the kernels' own (bfloat16), the blocks are one
call; elsewhere there is one call between two products.

Shapes: T rows, D width, F feed-forward width, H query heads, K key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from upslope.kernels import usable
from upslope.kernels.attention import attention_step
from upslope.kernels.decoder import BlockWeights, DecoderBlocks, DecoderShape, KeptRows
from upslope.kernels.products import Reordered, pad_rows
from upslope.kernels.rows import norm_into, swiglu_into
from upslope.models.attention.context import PagedContext
from upslope.models.decoder.network import Decoder
from upslope.models.linear import PackedWeights, joined
from upslope.models.protocol import CausalModel

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
    """A decoder's layers as products and norm weights; valid until its weights change or `PackedWeights.clear`."""

    def __init__(self, decoder: Decoder, layers: list[_Layer], blocks: DecoderBlocks | None) -> None:
        self.decoder, self.layers, self.blocks = decoder, layers, blocks
        self.last_norm = decoder.model.norm.weight.detach()

    @classmethod
    def of(cls, model: CausalModel, packed: PackedWeights) -> PreparedDecoder | None:
        """The decoder prepared; None for another network, layers that are not plain (adapters), or no kernels."""
        if not isinstance(model, Decoder):
            return None
        config, last_norm = model.config, model.model.norm.weight
        if config.head_dim % 2 or not usable(last_norm, model.head_weight):
            return None
        layers, blocks = [], []
        for layer in model.model.layers:
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
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            d=config.head_dim,
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
        )
        whole = len(blocks) == len(layers)
        return cls(model, layers, DecoderBlocks(shape, blocks, last_norm.detach()) if whole else None)

    @torch.no_grad()
    def forward(self, tokens_T: Tensor, context: PagedContext, kept: KeptRows | None = None) -> Tensor:
        """The decoder's hidden states [T, D]; what lies between goes into T rows of `kept`, where it is given."""
        decoder, c, cache, real = self.decoder, self.decoder.config, context.cache, tokens_T.shape[0]
        angles, embedding = decoder.angles(context.positions_T), decoder.model.embed_tokens.weight
        if self.blocks is not None:
            x = F.embedding(tokens_T, embedding)
            return self.blocks.run(x, angles, cache.keys, cache.values, context.described, context.blocks, kept)
        x = F.embedding(pad_rows(tokens_T, least=decoder.least_rows), embedding)
        rows, heads, kv_heads = x.shape[0], c.num_attention_heads, c.num_key_value_heads
        normed, scales = torch.empty_like(x), torch.empty(rows, dtype=torch.float32)
        q, k, v = (x.new_empty(real, n, c.head_dim) for n in (heads, kv_heads, kv_heads))
        out, gated = x.new_zeros(rows, heads * c.head_dim), x.new_empty(rows, c.intermediate_size)
        how: dict[str, Any] = {"qkv": (q, k, v), "angles": angles, "scale": c.head_dim**-0.5, "eps": c.rms_norm_eps}
        at = None if kept is None else slice(kept.first, kept.first + real)
        delta = None
        for number, layer in enumerate(self.layers):
            norm_into(x, delta, layer.first_norm, x, normed, scales, c.rms_norm_eps)
            everything = layer.attend(normed)
            if kept is not None:
                if number:
                    kept.ends[number - 1, at].copy_(x[:real])
                kept.products[number, at].copy_(everything[:real])
                how["lse_TH"] = kept.lse[number, at]
            described = cache.keys[number], cache.values[number], context.described, context.blocks
            attention_step(everything, out, *described, norms=layer.head_norms, **how)
            norm_into(x, layer.out(out), layer.second_norm, x, normed, scales, c.rms_norm_eps)
            both = layer.widen(normed)
            if kept is not None:
                kept.attended[number, at].copy_(out[:real])
                kept.middle[number, at].copy_(x[:real])
                kept.gates[number, at].copy_(both[:real])
            swiglu_into(both, gated)
            delta = layer.narrow(gated)
        norm_into(x, delta, self.last_norm, x, normed, scales, c.rms_norm_eps)
        if kept is not None:
            kept.ends[-1, at].copy_(x[:real])
        return normed[:real]
