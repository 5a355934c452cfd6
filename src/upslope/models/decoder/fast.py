"""The decoder's fast paths: new tokens of cached sequences, and an update on what has just been sampled.

Of the pass over new tokens all that stays the same from step to step is prepared. The same kernels and products in the
same order as in network.py, so the same bits. With a few rows the way through modules costs as much time as the
arithmetic: where all products are the kernels' own (bfloat16), the blocks are one call; elsewhere there is one call
between two products.

On a CPU a token's activations are the same bits in sampling and in training. Where a step trains on sequences that the
very same weights have just sampled, its backward pass can therefore start from the sampler's activations: no forward
pass, and gradients that are bit for bit those after one.

Shapes: L layers, R kept rows (one per token), T rows, D width, F feed-forward width, H query heads, K key/value heads,
d head width.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from upslope.kernels import attention, rows, usable
from upslope.kernels.products import PackedWeights, Reordered, joined, pad_rows, padded_row_count
from upslope.models.attention.context import PackedContext, PagedContext
from upslope.models.decoder.network import Decoder, DecoderConfig, Layer
from upslope.models.protocol import CausalModel
from upslope.types import Batch

Product = Callable[[Tensor], Tensor]


class PreparedDecoder:
    """A decoder's layers as `BlockWeights` of products; valid until its weights change or `PackedWeights.clear`."""

    def __init__(
        self, decoder: Decoder, layers: list[attention.BlockWeights[Product]], blocks: attention.DecoderBlocks | None
    ) -> None:
        self.decoder, self.layers, self.blocks = decoder, layers, blocks
        self.last_norm = decoder.model.norm.weight.detach()

    @classmethod
    def of(cls, model: CausalModel, packed: PackedWeights) -> PreparedDecoder | None:
        """The decoder prepared; None for another network, layers that are not plain (adapters), or no kernels."""
        if not isinstance(model, Decoder) or model.config.head_dim % 2:
            return None
        config, last_norm, layers, blocks = model.config, model.model.norm.weight, [], []
        if not usable(last_norm, model.head_weight):
            return None
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            groups = (a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (m.gate_proj, m.up_proj), (m.down_proj,)
            found = [whole for group in groups if (whole := joined(*group)) is not None]
            if len(found) < len(groups):
                return None
            heads = (a.q_norm.weight.detach(), a.k_norm.weight.detach()) if config.qk_norm else None
            norms = layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach(), heads
            layers.append(attention.BlockWeights(*norms, *(packed.product(*one) for one in found)))
            copies = [(copy, bias) for weight, bias in found if isinstance(copy := packed.copy(weight), Reordered)]
            if len(copies) == len(found):
                blocks.append(attention.BlockWeights(*norms, *copies))
        shape = attention.DecoderShape(
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
        return cls(model, layers, attention.DecoderBlocks(shape, blocks, last_norm.detach()) if whole else None)

    @torch.no_grad()
    def forward(self, tokens_T: Tensor, context: PagedContext, kept: attention.KeptRows | None = None) -> Tensor:
        """The decoder's hidden states [T, D]; what lies between goes into T rows of `kept`, where it is given."""
        decoder, c, cache, real = self.decoder, self.decoder.config, context.cache, tokens_T.shape[0]
        angles, embedding = decoder.angles(context.positions_T), decoder.model.embed_tokens.weight
        if self.blocks is not None:
            x = F.embedding(tokens_T, embedding)
            return self.blocks.run(x, angles, cache.keys, cache.values, context.described, context.blocks, kept)
        x = F.embedding(pad_rows(tokens_T, least=decoder.least_rows), embedding)
        count, heads, kv_heads = x.shape[0], c.num_attention_heads, c.num_key_value_heads
        normed, scales = torch.empty_like(x), torch.empty(count, dtype=torch.float32)
        q, k, v = (x.new_empty(real, n, c.head_dim) for n in (heads, kv_heads, kv_heads))
        out, gated = x.new_zeros(count, heads * c.head_dim), x.new_empty(count, c.intermediate_size)
        how: dict[str, Any] = {"qkv": (q, k, v), "angles": angles, "scale": c.head_dim**-0.5, "eps": c.rms_norm_eps}
        at = None if kept is None else slice(kept.first, kept.first + real)
        delta = None
        for number, layer in enumerate(self.layers):
            rows.norm_into(x, delta, layer.first_norm, x, normed, scales, c.rms_norm_eps)
            everything = layer.attend(normed)
            if kept is not None:
                if number:
                    kept.ends[number - 1, at].copy_(x[:real])
                kept.products[number, at].copy_(everything[:real])
                how["lse_TH"] = kept.lse[number, at]
            described = cache.keys[number], cache.values[number], context.described, context.blocks
            attention.attention_step(everything, out, *described, norms=layer.head_norms, **how)
            rows.norm_into(x, layer.out(out), layer.second_norm, x, normed, scales, c.rms_norm_eps)
            both = layer.widen(normed)
            if kept is not None:
                kept.attended[number, at].copy_(out[:real])
                kept.middle[number, at].copy_(x[:real])
                kept.gates[number, at].copy_(both[:real])
            rows.swiglu_into(both, gated)
            delta = layer.narrow(gated)
        rows.norm_into(x, delta, self.last_norm, x, normed, scales, c.rms_norm_eps)
        if kept is not None:
            kept.ends[-1, at].copy_(x[:real])
        return normed[:real]


def _widths(config: DecoderConfig) -> dict[str, int]:
    """How many numbers are kept of a token and layer, as `KeptRows` names them, but for the float32 `lse`."""
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    width, wide = config.hidden_size, 2 * config.intermediate_size
    products = (heads + 2 * kv_heads) * d
    return {"products": products, "attended": heads * d, "middle": width, "gates": wide, "ends": width}


def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Memory of a kept token over all layers."""
    numbers = sum(_widths(config).values())
    return config.num_hidden_layers * (numbers * dtype.itemsize + 4 * config.num_attention_heads)


class Activations:
    """Room for the activations of `capacity` tokens of one decoder, all of one version of its weights.

    Memory is the system's until it is written to. Per layer and token: the product of q, k and v, what attention gave
    and its log of the normaliser (float32), the sum before the second norm, gate and up, the sum at the layer's end.
    """

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        self.decoder, self.capacity, size = decoder, capacity, (decoder.config.num_hidden_layers, capacity)
        rooms = {name: torch.empty(*size, n, dtype=decoder.dtype) for name, n in _widths(decoder.config).items()}
        lse = torch.empty(*size, decoder.config.num_attention_heads, dtype=torch.float32)
        self.kept = attention.KeptRows(**rooms, lse=lse, first=0)
        self._rows: dict[tuple[int, ...], array[int]] = {}
        self._taken = 0

    @classmethod
    def of(cls, model: CausalModel, *, tokens: int, limit_bytes: int) -> Activations | None:
        """Room for `tokens`, or for as many as the limit allows; None for a network whose layers cannot be replayed."""
        if not isinstance(model, Decoder) or not model.exact or model.config.qk_norm or model.config.output_bias:
            return None
        if PreparedDecoder.of(model, PackedWeights()) is None:
            return None
        capacity = min(tokens, limit_bytes // bytes_per_token(model.config, model.dtype))
        return cls(model, capacity) if capacity else None

    def clear(self) -> None:
        """Forget everything: the weights change, or other sequences come."""
        self._rows.clear()
        self._taken = 0

    @property
    def full(self) -> bool:
        """Whether a token came for which there was no room."""
        return self._taken > self.capacity

    def take(self, count: int) -> attention.KeptRows | None:
        """The next `count` rows, to be written to; None, now and until `clear`, where there are no more so many."""
        first, self._taken = self._taken, self._taken + count
        return None if self.full else self.kept._replace(first=first)

    def finished(self, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """A sequence's fed tokens and the rows where their activations lie."""
        self._rows[tuple(tokens)] = array("q", rows)

    def attach(self, batch: Batch) -> bool:
        """Have a packed batch start from what is kept; False, and nothing done, where some of it is not."""
        if padded_row_count(batch.tokens_T.shape[0]) != batch.tokens_T.shape[0]:
            return False
        rows = self._rows_of(batch)
        batch.replay = None if rows is None else _Replay(self, rows)
        return rows is not None

    def _rows_of(self, batch: Batch) -> Tensor | None:
        pieces = [tuple(piece.tolist()) for piece in batch.tokens_T.split(batch.lengths)]
        found: list[array[int] | None] = [None] * len(pieces)
        parents = set(batch.parents)
        for i, (piece, parent) in enumerate(zip(pieces, batch.parents, strict=True)):
            if i in parents:
                continue  # its rows are those of what continues it
            before = () if parent == -1 else pieces[parent]
            rows = self._rows.get((*before, *piece))
            if rows is None:
                return None
            found[i] = rows[len(before) :]
            if parent != -1:
                found[parent] = rows[: len(before)]
        return torch.tensor([row for rows in found if rows is not None for row in rows])


class _Replay(NamedTuple):
    """The forward pass of a packed batch as a look-up."""

    store: Activations
    rows_T: Tensor

    def stands_for(self, model: CausalModel) -> bool:
        """Whether these are the activations of that network."""
        return model is self.store.decoder

    def hidden(self, tokens_T: Tensor, context: PackedContext) -> Tensor:
        """What the decoder's forward pass returns, [T, D], differentiable in its weights."""
        decoder = self.store.decoder
        if not torch.is_grad_enabled():
            return decoder.model.norm(self.store.kept.ends[-1].index_select(0, self.rows_T))
        cos, sin = decoder.angles(context.positions_T)
        x = F.embedding(tokens_T, decoder.model.embed_tokens.weight)
        for number, layer in enumerate(decoder.model.layers):
            at = _Place(self.store, self.rows_T, number, layer, context, cos, sin)
            x = _Replayed.apply(x, at, *_parameters(layer))
        return decoder.model.norm(x)


class _Place(NamedTuple):
    store: Activations
    rows_T: Tensor
    number: int
    layer: Layer
    context: PackedContext
    cos: Tensor
    sin: Tensor

    def take(self, of: Tensor) -> Tensor:
        return of[self.number].index_select(0, self.rows_T)


def _parameters(layer: Layer) -> list[nn.Parameter]:
    """In the order in which `_Replayed.backward` gives their gradients."""
    a, m = layer.self_attn, layer.mlp
    qkv = a.q_proj, a.k_proj, a.v_proj
    return [
        layer.input_layernorm.weight,
        *(p.weight for p in qkv),
        *(p.bias for p in qkv if p.bias is not None),
        a.o_proj.weight,
        layer.post_attention_layernorm.weight,
        *(p.weight for p in (m.gate_proj, m.up_proj, m.down_proj)),
    ]


class _Replayed(torch.autograd.Function):
    """A decoder block whose forward pass is looked up; its backward pass is the sequence of the modules' own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: _Place, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.at = at
        return at.take(at.store.kept.ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        at: _Place = ctx.at
        (x,), kept, a, m = ctx.saved_tensors, at.store.kept, at.layer.self_attn, at.layer.mlp
        wide, attend = joined(m.gate_proj, m.up_proj), joined(a.q_proj, a.k_proj, a.v_proj)
        assert wide is not None
        assert attend is not None
        first, second = at.layer.input_layernorm, at.layer.post_attention_layernorm
        parts = [a.q_proj.weight.shape[0], a.k_proj.weight.shape[0], a.v_proj.weight.shape[0]]

        both = at.take(kept.gates)
        d_down = grad.t() @ rows.swiglu(both)
        d_both = rows.swiglu_gradient(both, grad @ m.down_proj.weight)
        middle = at.take(kept.middle)
        normed, _, scales = rows.norm(middle, None, second.weight, second.eps)
        d_wide = d_both.t() @ normed
        d_middle, d_second = rows.norm_gradient(middle, second.weight, scales, d_both @ wide[0], grad)

        attended = at.take(kept.attended)
        d_out = d_middle.t() @ attended
        heads = attended.shape[0], a.heads, a.head_dim
        q, k, v = rows.split(at.take(kept.products), at.cos, at.sin, a.heads, a.kv_heads)
        d_attended = (d_middle @ a.o_proj.weight).view(heads)
        context = at.context
        d_heads = attention.packed_attention_gradient(
            *(q, k, v, attended.view(heads), at.take(kept.lse), d_attended),
            *(context.described, context.causal, a.scale),
        )
        d_products = rows.join_rotate(*d_heads, at.cos, at.sin)
        normed, _, scales = rows.norm(x, None, first.weight, first.eps)
        d_attend = d_products.t() @ normed
        d_biases = () if attend[1] is None else d_products.sum(0).split(parts)
        # the first block's sum is made by autograd from two gradients, every other one's by the norm's own kernel
        through = d_middle if at.number else None
        d_x, d_first = rows.norm_gradient(x, first.weight, scales, d_products @ attend[0], through)
        if not at.number:
            d_x = d_x + d_middle
        gates = d_wide.split(m.gate_proj.weight.shape[0])
        return d_x, None, d_first, *d_attend.split(parts), *d_biases, d_out, d_second, *gates, d_down
