"""What sampling computed of its sequences, kept so that the update need not compute it again.

On a CPU a token's activations are the same bits in sampling and in training. Where a step trains on sequences that the
very same weights have just sampled, its backward pass can therefore start from the sampler's activations: no forward
pass, and gradients that are bit for bit those after one.

Shapes: L layers, R kept rows (one per token), T rows of a packed batch, D width, F feed-forward width, H query heads,
K key/value heads, d head width.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from upslope.kernels.attention import packed_attention_gradient
from upslope.kernels.decoder import KeptRows
from upslope.kernels.products import padded_row_count
from upslope.kernels.rows import join_rotate, norm, norm_gradient, split, swiglu, swiglu_gradient
from upslope.models.attention.context import PackedContext
from upslope.models.decoder.network import Decoder, DecoderConfig, Layer
from upslope.models.decoder.prepared import PreparedDecoder
from upslope.models.linear import PackedWeights, joined
from upslope.models.protocol import CausalModel
from upslope.types import Batch


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
        self.kept = KeptRows(**rooms, lse=lse, first=0)
        self._rows: dict[tuple[int, ...], array[int]] = {}
        self._taken = 0

    @classmethod
    def of(cls, model: CausalModel, *, tokens: int, limit_bytes: int) -> Activations | None:
        """Room for `tokens`, or for as many as the limit allows; None for a network whose layers cannot be replayed."""
        if not isinstance(model, Decoder) or not model.exact:
            return None
        c = model.config
        if c.qk_norm or c.output_bias or PreparedDecoder.of(model, PackedWeights()) is None:
            return None
        capacity = min(tokens, limit_bytes // bytes_per_token(c, model.dtype))
        return cls(model, capacity) if capacity else None

    def clear(self) -> None:
        """Forget everything: the weights change, or other sequences come."""
        self._rows.clear()
        self._taken = 0

    @property
    def full(self) -> bool:
        """Whether a token came for which there was no room."""
        return self._taken > self.capacity

    def take(self, count: int) -> KeptRows | None:
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
            x = _Layer.apply(x, at, *_parameters(layer))
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
    """In the order in which `_Layer.backward` gives their gradients."""
    a, m = layer.self_attn, layer.mlp
    qkv = a.q_proj, a.k_proj, a.v_proj
    biases = [p.bias for p in qkv if p.bias is not None]
    return [
        layer.input_layernorm.weight,
        *(p.weight for p in qkv),
        *biases,
        a.o_proj.weight,
        layer.post_attention_layernorm.weight,
        m.gate_proj.weight,
        m.up_proj.weight,
        m.down_proj.weight,
    ]


class _Layer(torch.autograd.Function):
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
        d_down = grad.t() @ swiglu(both)
        d_both = swiglu_gradient(both, grad @ m.down_proj.weight)
        middle = at.take(kept.middle)
        normed, _, scales = norm(middle, None, second.weight, second.eps)
        d_wide = d_both.t() @ normed
        d_middle, d_second = norm_gradient(middle, second.weight, scales, d_both @ wide[0], grad)

        attended = at.take(kept.attended)
        d_out = d_middle.t() @ attended
        heads = attended.shape[0], a.heads, a.head_dim
        q, k, v = split(at.take(kept.products), at.cos, at.sin, a.heads, a.kv_heads)
        d_attended = (d_middle @ a.o_proj.weight).view(heads)
        context = at.context
        d_heads = packed_attention_gradient(
            *(q, k, v, attended.view(heads), at.take(kept.lse), d_attended),
            *(context.described, context.causal, a.scale),
        )
        d_products = join_rotate(*d_heads, at.cos, at.sin)
        normed, _, scales = norm(x, None, first.weight, first.eps)
        d_attend = d_products.t() @ normed
        d_biases = () if attend[1] is None else d_products.sum(0).split(parts)
        # the first block's sum is made by autograd from two gradients, every other one's by the norm's own kernel
        through = d_middle if at.number else None
        d_x, d_first = norm_gradient(x, first.weight, scales, d_products @ attend[0], through)
        if not at.number:
            d_x = d_x + d_middle
        gates = d_wide.split(m.gate_proj.weight.shape[0])
        return d_x, None, d_first, *d_attend.split(parts), *d_biases, d_out, d_second, *gates, d_down
