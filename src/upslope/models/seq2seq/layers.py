"""The shape of an encoder-decoder, its layers, and how target rows are kept apart from source rows in attention.

The shape has two forms on disk: Marian's (norm after) and Pegasus' (norm before).

Shapes: T rows of a call, D width, H heads, d head width, w padded head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upslope.errors import ConfigError, ModelError
from upslope.kernels.products import least_rows, pad_rows
from upslope.models.attention.context import PackedContext
from upslope.models.protocol import Context

SEQ2SEQ_TYPES = ("marian", "pegasus")
ACTIVATIONS = ("relu", "gelu", "silu", "swish")
_ARCHITECTURES = {"marian": "MarianMTModel", "pegasus": "PegasusForConditionalGeneration"}
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "encoder_layers", "decoder_layers"),
    *("num_attention_heads", "max_position_embeddings"),
)
_NAMES = {
    "d_model": "hidden_size",
    **{name: name for name in ("encoder_layers", "decoder_layers")},
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), "intermediate_size"),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), "num_attention_heads"),
    "max_position_embeddings": "max_position_embeddings",
    "activation_function": "activation",
    **{name: name for name in ("scale_embedding", "dropout", "pad_token_id", "eos_token_id", "decoder_start_token_id")},
}
"""Keys of a config.json that stand for one field each, in its order."""
_KNOWN = {
    *_NAMES,
    *("architectures", "model_type", "is_encoder_decoder", "vocab_size", "decoder_vocab_size"),
    *("share_encoder_decoder_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size"),
    *("tie_word_embeddings", "dtype", "torch_dtype", "transformers_version"),
}


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """An encoder-decoder Transformer (Vaswani et al. 2017, arXiv 1706.03762) with sinusoidal positions.

    vocab_size: target tokens, over which logits are. source_vocab_size: None where source and target share one
    vocabulary and one embedding; else source id s stands in token lists as vocab_size + s. norm: "post" as in the
    paper, or "pre" (Xiong et al. 2020, arXiv 2002.04745), which has shared vocabularies only. Source and target each
    hold max_position_embeddings tokens, the target's decoder_start_token_id counted. scale_embedding: embeddings are
    multiplied by sqrt(hidden_size). dropout: on embeddings and residual branches, and only where a network's
    `use_dropout` is set. Raises ConfigError for values that fit no network.
    """

    vocab_size: int
    source_vocab_size: int | None = None
    hidden_size: int
    intermediate_size: int
    encoder_layers: int
    decoder_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    norm: Literal["post", "pre"] = "post"
    pad_token_id: int
    eos_token_id: int | list[int]
    decoder_start_token_id: int
    activation: str = "relu"
    scale_embedding: bool = True
    dropout: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least 1")
        source, last, heads = self.source_vocab_size, self.vocab_size - 1, self.num_attention_heads
        ids = {"pad_token_id": self.pad_token_id, "decoder_start_token_id": self.decoder_start_token_id}
        if isinstance(self.eos_token_id, int):
            ids["eos_token_id"] = self.eos_token_id
        checks = (
            (self.hidden_size % heads == 0, f"hidden_size = {self.hidden_size} is no multiple of {heads} heads"),
            (self.norm in ("post", "pre"), f"norm = {self.norm!r}: must be post or pre"),
            (
                self.norm != "pre" or source is None,
                "norm = 'pre' needs one shared vocabulary: leave source_vocab_size out or take norm post",
            ),
            (source is None or source >= 1, f"source_vocab_size = {source}: must be at least 1, or left out"),
            (
                self.activation in ACTIVATIONS,
                f"activation = {self.activation!r}: must be one of {', '.join(ACTIVATIONS)}",
            ),
            (0 <= self.dropout < 1, f"dropout = {self.dropout}: must be in [0, 1)"),
            *(
                (isinstance(value, int) and 0 <= value <= last, f"{name} = {value}: must be a target token, 0..{last}")
                for name, value in ids.items()
            ),
        )
        for fine, message in checks:
            if not fine:
                raise ConfigError(message)
        if source is not None and self.pad_token_id >= source:
            raise ConfigError(f"pad_token_id = {self.pad_token_id} must also be a source token (it pads both sides)")

    @property
    def model_type(self) -> str:
        """The Hugging Face architecture with this layout."""
        return "marian" if self.norm == "post" else "pegasus"

    @property
    def source_offset(self) -> int:
        """What is added to a source id in token lists: 0 with a shared vocabulary."""
        return 0 if self.source_vocab_size is None else self.vocab_size

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Seq2SeqConfig:
        """Read a config.json that says every key. Raises ModelError where the network would differ from ours."""
        kind = config.get("model_type", "")
        if kind not in SEQ2SEQ_TYPES:
            raise ModelError(f"model_type {kind!r} is not one of {', '.join(SEQ2SEQ_TYPES)}")
        for name in ("attention_heads", "ffn_dim"):
            pair = config[f"encoder_{name}"], config[f"decoder_{name}"]
            if pair[0] != pair[1]:
                raise ModelError(f"{kind}: encoder_{name} {pair[0]} differs from decoder_{name} {pair[1]}")
        if not config.get("tie_word_embeddings", True):
            raise ModelError(f"{kind}: tie_word_embeddings=false is not supported")
        separate = kind == "marian" and not config.get("share_encoder_decoder_embeddings", True)
        target = (config.get("decoder_vocab_size") or config["vocab_size"]) if separate else config["vocab_size"]
        plain: dict[str, Any] = {field: config[name] for name, field in _NAMES.items()}
        plain |= {"scale_embedding": bool(plain["scale_embedding"]), "dropout": float(plain["dropout"])}
        try:
            return cls(
                vocab_size=target,
                source_vocab_size=config["vocab_size"] if separate else None,
                norm="post" if kind == "marian" else "pre",
                extra={k: v for k, v in config.items() if k not in _KNOWN},
                **plain,
            )
        except ConfigError as error:
            raise ModelError(f"{kind}: {error}") from error

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers reads back into the same network; it leaves no default to be guessed."""
        one = self.source_vocab_size is None
        marian = {"decoder_vocab_size": self.vocab_size, "share_encoder_decoder_embeddings": one}
        return {
            **{"attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
            **{"bos_token_id": None, "forced_eos_token_id": None},
            **self.extra,
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "is_encoder_decoder": True,
            "vocab_size": self.vocab_size if one else self.source_vocab_size,
            **{name: getattr(self, field) for name, field in _NAMES.items()},
            "tie_word_embeddings": True,
            **(marian if self.model_type == "marian" else {}),
        }

    def generation_config(self) -> dict[str, Any]:
        """A generation_config.json that decodes greedily up to the end of the target's positions, forcing nothing."""
        return {
            "decoder_start_token_id": self.decoder_start_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "max_length": self.max_position_embeddings,
            "num_beams": 1,
            "do_sample": False,
        }


_ALIGN = 8  # the flag widens the heads to a multiple of this
_NORM_EPS = 1e-5

Drop = Callable[[Tensor], Tensor]


def is_seq2seq(raw: Mapping[str, Any]) -> bool:
    """True for a config.json whose network models.seq2seq.network runs."""
    return raw.get("model_type") in SEQ2SEQ_TYPES


def sinusoids(positions: int, width: int) -> Tensor:
    """Positional embedding, float64 [positions, width]: sin(t / 10000^(2i / D)) for all i, then the cosines.

    Section 3.5 of the paper, with sines and cosines in halves as Hugging Face's Marian lays them.
    """
    rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles[:, : width // 2].cos()], dim=1)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias, computed in float32 (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + _NORM_EPS)
        return (centred * scale * self.weight + self.bias).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rows of a call are source and which target, and where each stands in its own side."""

    total: int
    source_lengths: tuple[int, ...]
    source_rows: Tensor
    source_positions: Tensor
    target_rows: Tensor
    target_positions: Tensor


class Attention(nn.Module):
    """Projections of multi-head attention, with biases."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.width = padded_head_dim(self.head_dim)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))
        self.scale = self.head_dim**-0.5
        self.least = least_rows(config.hidden_size * min(config.hidden_size, config.intermediate_size))

    def split(self, projected: Tensor, real: int) -> Tensor:
        """[rows, D] -> [real, H, d]."""
        return projected[:real].view(real, self.heads, self.head_dim)

    def encode(self, x: Tensor, context: PackedContext) -> Tensor:
        """Every source token over all tokens of its source."""
        real = context.positions_T.shape[0]
        q, k, v = (self.split(project(x), real) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(pad_rows(context.attend(0, q, k, v, self.scale).flatten(1), least=self.least))

    def decode(self, x: Tensor, memory: Tensor | None, layer: int, layout: Layout, context: Context) -> Tensor:
        """Target rows x over target rows (memory None) or over the source rows `memory`, in cache layer `layer`."""
        real, sources = layout.target_rows.shape[0], layout.source_rows.shape[0]
        q = self._spread(self.split(self.q_proj(x), real), layout.target_rows, layout.total, inside=1.0)
        seen, count, rows = (x, real, layout.target_rows) if memory is None else (memory, sources, layout.source_rows)
        if count:
            k, v = (self.split(project(seen), count) for project in (self.k_proj, self.v_proj))
        else:  # plain decoding: every source lies in the cache
            k = v = x.new_zeros(0, self.heads, self.head_dim)
        # makes a probability exactly 0 after scaling and exp, and overflows in no product
        barrier = -3e4 if x.dtype == torch.float16 else -1e30
        k = self._spread(k, rows, layout.total, outside=barrier)
        out = context.attend(layer, q, k, self._spread(v, rows, layout.total), self.scale)
        out = out.index_select(0, layout.target_rows)[..., : self.head_dim]
        return self.out_proj(pad_rows(out.reshape(real, -1), least=self.least))

    def _spread(self, x: Tensor, rows: Tensor, total: int, *, inside: float = 0.0, outside: float = 0.0) -> Tensor:
        """[n, H, d] -> [T, H, w]: x at `rows` with `inside` as its flag, zeros with `outside` elsewhere."""
        wide = F.pad(x, (0, self.width - self.head_dim))
        if inside:
            wide[..., self.head_dim] = inside
        base = x.new_zeros(total, self.heads, self.width)
        if outside:
            base[..., self.head_dim] = outside
        return base.index_copy(0, rows, wide)


def padded_head_dim(head_dim: int) -> int:
    """Width of a head with its flag, a multiple of 8."""
    return (head_dim // _ALIGN + 1) * _ALIGN


class _Layer(nn.Module):
    """What encoder and decoder layers share: the feed-forward, and where the norm stands."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.pre, self.activation = config.norm == "pre", config.activation
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = LayerNorm(config.hidden_size)

    def residual(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor], drop: Drop) -> Tensor:
        """norm(x + branch(x)), or x + branch(norm(x))."""
        return x + drop(branch(norm(x))) if self.pre else norm(x + drop(branch(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The nonlinearity is made of operations whose results do not depend on a value's place in memory."""
        x = self.fc1(x)
        if self.activation == "relu":
            return self.fc2(x.relu())
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.activation == "gelu":
            return self.fc2((0.5 * wide * (1.0 + (wide * math.sqrt(0.5)).erf())).to(x.dtype))
        return self.fc2((wide / (1.0 + wide.neg().exp())).to(x.dtype))


class EncoderLayer(_Layer):
    """Self-attention over the whole source, then the feed-forward."""

    def forward(self, x: Tensor, context: PackedContext, drop: Drop) -> Tensor:
        x = self.residual(x, self.self_attn_layer_norm, lambda y: self.self_attn.encode(y, context), drop)
        return self.residual(x, self.final_layer_norm, self.feed_forward, drop)


class DecoderLayer(_Layer):
    """Causal self-attention, attention over the source, then the feed-forward."""

    def __init__(self, config: Seq2SeqConfig, index: int) -> None:
        super().__init__(config)
        self.index = index
        self.encoder_attn = Attention(config)
        self.encoder_attn_layer_norm = LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, memory: Tensor, layout: Layout, context: Context, drop: Drop) -> Tensor:
        def itself(y: Tensor) -> Tensor:
            return self.self_attn.decode(y, None, 2 * self.index, layout, context)

        def source(y: Tensor) -> Tensor:
            return self.encoder_attn.decode(y, memory, 2 * self.index + 1, layout, context)

        x = self.residual(x, self.self_attn_layer_norm, itself, drop)
        x = self.residual(x, self.encoder_attn_layer_norm, source, drop)
        return self.residual(x, self.final_layer_norm, self.feed_forward, drop)


class Side(nn.Module):
    """The layers of encoder or decoder, their own embedding where it is not shared, the last norm of the pre form."""

    def __init__(self, config: Seq2SeqConfig, layers: Sequence[nn.Module], vocab_size: int | None) -> None:
        super().__init__()
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        if config.norm == "pre":
            self.layer_norm = LayerNorm(config.hidden_size)


class Trunk(nn.Module):
    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        if config.source_vocab_size is None:
            self.shared = nn.Embedding(config.vocab_size, config.hidden_size)
        encoder = [EncoderLayer(config) for _ in range(config.encoder_layers)]
        decoder = [DecoderLayer(config, i) for i in range(config.decoder_layers)]
        self.encoder = Side(config, encoder, config.source_vocab_size)
        self.decoder = Side(config, decoder, None if config.source_vocab_size is None else config.vocab_size)
