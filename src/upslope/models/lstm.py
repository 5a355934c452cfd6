"""An LSTM language model: embedding, a stack of LSTM layers, a linear head (Hochreiter & Schmidhuber 1997, Neural
Computation 9(8); forget gate: Gers, Schmidhuber & Cummins 2000, Neural Computation 12(10)).

    i, f, g, o = split(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
    c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
    h_t = sigmoid(o) * tanh(c_t)

It runs through the engine and the trainer as a Transformer does. The state (h, c) after each token lies in the
token's slot of the block cache, h as its key and c as its value, so that sharing and forking of blocks, the prefix
cache, chunked prefill and preemption need nothing of their own: a sequence goes on from the slot before its first new
token. The state is rounded to the compute dtype after every token, in training too, and every operation is
row-wise in a form that does not depend on where a value lies in memory: a token's hidden state is the same bits in a
packed training batch and in decoding.

The names of a layer's weights, their shapes and the order of the gates are those of torch.nn.LSTM, which computes the
same function. The folder is in the Hugging Face layout, but transformers has no such architecture: only upslope loads
it (`models.files.loading.load_model`).

Shapes: T packed tokens, H width, V vocabulary, S sequences or segments of one phase, n of them active at a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upslope.errors import ModelError
from upslope.kernels.products import pad_rows, padded_row_count
from upslope.models.protocol import CausalModel, Context, ModelSpec, Segment

MODEL_TYPE = "upslope_lstm"
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")


@dataclass(frozen=True, kw_only=True)
class LSTMConfig:
    """The shape of the model; field names are those of a Hugging Face config.json.

    `max_position_embeddings` bounds a sequence's length for the engine: the network itself has no positions.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LSTMConfig:
        """Read a config.json. Raises ModelError for another model_type or a size that is missing or below 1."""
        if config.get("model_type") != MODEL_TYPE:
            raise ModelError(f"model_type {config.get('model_type')!r} is not {MODEL_TYPE}")
        sizes = {name: config.get(name) for name in _SIZES}
        sizes["max_position_embeddings"] = config.get("max_position_embeddings", cls.max_position_embeddings)
        for name, value in sizes.items():
            if type(value) is not int or value < 1:
                raise ModelError(f"{MODEL_TYPE}: {name} is {value!r} in config.json; it must be a whole number from 1")
        known = {*sizes, "model_type", "tie_word_embeddings", "architectures", "dtype", "torch_dtype"}
        return cls(
            **sizes,  # type: ignore[arg-type]
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            extra={k: v for k, v in config.items() if k not in known},
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json that `from_hf` reads back."""
        return {
            **self.extra,
            "architectures": ["LSTM"],
            "model_type": MODEL_TYPE,
            **{name: getattr(self, name) for name in (*_SIZES, "max_position_embeddings", "tie_word_embeddings")},
        }


@dataclass(frozen=True, slots=True)
class _Phase:
    """Sequences that advance together, longest first: active[t] of them take step t, at rows offset + sum(active[:t]).

    `parents` (empty for sequences that start anew or from the cache): the row whose state each one starts from.
    """

    offset: int
    active: tuple[int, ...]
    parents: Tensor | None = None

    @property
    def steps(self) -> list[tuple[int, int]]:
        """(first row, number of rows) of every step."""
        firsts = accumulate(self.active, initial=self.offset)
        return list(zip(firsts, self.active, strict=False))


@dataclass(frozen=True, slots=True)
class _Schedule:
    """The order in which tokens are computed: step by step, all sequences of a step side by side.

    order [T]: the token computed at each row; inverse [T]: the row of each token. previous [T]: the row whose state a
    row continues; T + s for the initial state of sequence s of the first phase. members [S]: which sequence of the
    call stands at place s of the first phase.
    """

    phases: tuple[_Phase, ...]
    order: Tensor
    inverse: Tensor
    previous: Tensor
    members: Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device | str) -> _Schedule:
        """Segments that continue none of the call first, then those that continue one of them."""
        total = sum(s.count for s in segments)
        order: list[int] = []
        previous: list[int] = []
        phases: list[_Phase] = []
        last_row: dict[int, int] = {}
        members: list[int] = []
        for child in (False, True):
            chosen = [i for i, s in enumerate(segments) if (s.parent != -1) == child]
            if not chosen:
                continue
            chosen.sort(key=lambda i: -segments[i].count)
            offset, active, here = len(order), [], len(chosen)
            for t in range(segments[chosen[0]].count):
                while segments[chosen[here - 1]].count <= t:
                    here -= 1
                start = len(order)
                if t:
                    previous += range(start - active[-1], start - active[-1] + here)
                else:
                    previous += [last_row[segments[i].parent] for i in chosen] if child else range(total, total + here)
                order += [segments[i].row + t for i in chosen[:here]]
                active.append(here)
            if not child:
                members = chosen
                steps = _Phase(offset, tuple(active)).steps
                last_row = {i: steps[segments[i].count - 1][0] + place for place, i in enumerate(chosen)}
            from_rows = torch.tensor([last_row[segments[i].parent] for i in chosen], device=device) if child else None
            phases.append(_Phase(offset, tuple(active), from_rows))
        rows = torch.tensor(order, device=device)
        return cls(
            phases=tuple(phases),
            order=rows,
            inverse=torch.argsort(rows),
            previous=torch.tensor(previous, device=device),
            members=torch.tensor(members, device=device),
        )


def _tanh_(x: Tensor) -> Tensor:
    """tanh in place, as 2 sigmoid(2x) - 1: exp and division give a number the same bits wherever it lies."""
    return x.mul_(-2).exp_().add_(1).reciprocal_().mul_(2).sub_(1)


class _Recurrence(torch.autograd.Function):
    """One layer over a schedule, from W_ih x + b [T, 4H] to the states h, c [T, H]; gradients flow through h.

    The backward pass is the chain rule by hand: the parts of it that need no earlier step run over all rows at once,
    and the gradient of W_hh is one product at the end.
    """

    @staticmethod
    def forward(ctx, x, weight_hh, h0, c0, schedule: _Schedule):  # type: ignore[no-untyped-def]
        width = weight_hh.shape[1]
        stat = torch.promote_types(x.dtype, torch.float32)
        gates = x.to(stat, copy=True)
        h, c = x.new_empty(x.shape[0], width), x.new_empty(x.shape[0], width)
        for phase in schedule.phases:
            start_h, start_c = (h0, c0) if phase.parents is None else (h[phase.parents], c[phase.parents])
            carry_h = pad_rows(start_h.clone())  # rows beyond the active ones hold what no active row looks at
            carry_c = start_c
            for first, n in phase.steps:
                rows = slice(first, first + n)
                z = gates[rows].add_(F.linear(carry_h[: padded_row_count(n)], weight_hh)[:n])
                z[:, 2 * width : 3 * width].mul_(2)
                z.neg_().exp_().add_(1).reciprocal_()
                z[:, 2 * width : 3 * width].mul_(2).sub_(1)
                i, f, g, o = z.chunk(4, dim=1)
                torch.add(f * carry_c[:n], i * g, out=c[rows]) if stat == x.dtype else c[rows].copy_(
                    f * carry_c[:n].to(stat) + i * g
                )
                carry_c = c[rows]
                carry_h[:n] = _tanh_(carry_c.to(stat, copy=True)).mul_(o)
                h[rows] = carry_h[:n]
        ctx.save_for_backward(gates, h, c, weight_hh, h0, c0)
        ctx.schedule = schedule
        ctx.mark_non_differentiable(c)
        return h, c

    @staticmethod
    def backward(ctx, grad_h, _):  # type: ignore[no-untyped-def]
        gates, h, c, weight_hh, h0, c0 = ctx.saved_tensors
        schedule, stat, dtype, width = ctx.schedule, gates.dtype, h.dtype, h.shape[1]
        i, f, g, o = gates.chunk(4, dim=1)
        before_c = torch.cat([c, c0])[schedule.previous].to(stat)
        tanh_c = _tanh_(c.to(stat, copy=True))
        through = o * (1 - tanh_c.square())  # dh/dc
        slopes = torch.stack([g * i * (1 - i), before_c * f * (1 - f), i * (1 - g.square())], dim=1)
        slope_o = tanh_c * o * (1 - o)
        grad_z = torch.empty_like(gates).view(-1, 4, width)
        late_h = grad_h.to(stat, copy=True)
        late_c = torch.zeros_like(late_h) if len(schedule.phases) > 1 else None
        for phase in reversed(schedule.phases):
            size = phase.active[0]
            carry_h = late_h.new_zeros(size, width)
            carry_c = torch.zeros_like(carry_h)
            for first, n in reversed(phase.steps):
                rows = slice(first, first + n)
                dh = carry_h[:n].add_(late_h[rows])
                dc = carry_c[:n].addcmul_(dh, through[rows])
                if late_c is not None:
                    dc.add_(late_c[rows])
                dz = grad_z[rows]
                torch.mul(slopes[rows], dc[:, None], out=dz[:, :3])
                torch.mul(slope_o[rows], dh, out=dz[:, 3])
                carry_h[:n] = dz.view(n, -1).to(dtype) @ weight_hh
                dc.mul_(f[rows])
            if phase.parents is not None:
                late_h.index_add_(0, phase.parents, carry_h)
                assert late_c is not None
                late_c.index_add_(0, phase.parents, carry_c)
        grad_x = grad_z.view(-1, 4 * width).to(dtype)
        before_h = torch.cat([h, h0])[schedule.previous]
        return grad_x, grad_x.T @ before_h, None, None, None


class _Layers(nn.Module):
    """The weights of a stack of LSTM layers, named and shaped as torch.nn.LSTM names and shapes them.

    Uniform in +-1/sqrt(H) as torch does; the forget gate's bias is 1, so that a fresh cell remembers (Gers et al. 2000;
    Jozefowicz, Zaremba & Sutskever 2015).
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        for layer in range(layers):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                shape = (4 * width, width) if name.startswith("weight") else (4 * width,)
                self.register_parameter(f"{name}_l{layer}", nn.Parameter(torch.empty(shape)))
        bound = width**-0.5
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if "bias" in name else nn.init.uniform_(parameter, -bound, bound)
        with torch.no_grad():
            for layer in range(layers):
                getattr(self, f"bias_ih_l{layer}")[width : 2 * width] = 1.0

    def forward(self, x: Tensor, layer: int, h0: Tensor, c0: Tensor, schedule: _Schedule) -> tuple[Tensor, Tensor]:
        """States h, c [T, H] of one layer for its inputs [T, H], both in the schedule's order."""
        weight, recurrent, bias, recurrent_bias = (
            getattr(self, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        gates = F.linear(pad_rows(x), weight, bias + recurrent_bias)[: x.shape[0]]
        return _Recurrence.apply(gates, recurrent, h0, c0, schedule)


class _Trunk(nn.Module):
    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lstm = _Layers(config.hidden_size, config.num_hidden_layers)


class LSTM(CausalModel):
    """The LSTM language model with random weights; models.files.loading fills it from a folder.

    The embedding starts as N(0, 1), tied or not: with less a small network takes several times as long to find what
    lies more than one token back.
    """

    def __init__(self, config: LSTMConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__(config, gradient_checkpointing)
        self.model = _Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.spec = ModelSpec(
            num_layers=config.num_hidden_layers,
            num_heads=1,
            num_kv_heads=1,
            head_dim=config.hidden_size,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
            intermediate_size=4 * config.hidden_size,
            parameters=sum(p.numel() for p in self.parameters()),
        )

    @property
    def output_weight(self) -> Tensor:
        """The output embedding [V, H]."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens_T: Tensor, context: Context) -> Tensor:
        """Hidden states [T, H] of the last layer, for tokens int64 [T] that stand where `context` says."""
        schedule = _Schedule.of(context.segments, tokens_T.device)
        x = F.embedding(tokens_T[schedule.order], self.model.embed_tokens.weight)
        zeros = x.new_zeros(len(schedule.members), self.config.hidden_size)
        for layer in range(self.config.num_hidden_layers):
            kept = context.before(layer)
            h0, c0 = (zeros, zeros) if kept is None else (kept[0][schedule.members, 0], kept[1][schedule.members, 0])
            x, c = self.run(self.model.lstm, x, layer, h0, c0, schedule)
            if kept is not None:
                context.write(layer, x[schedule.inverse][:, None], c[schedule.inverse][:, None])
        return x[schedule.inverse]
