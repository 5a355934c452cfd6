"""One decoder for the Llama family: Llama, Mistral, Qwen2, Qwen3 and SmolLM2, used for rollouts and for training.

RMSNorm, rotary positions (with llama3 and linear scaling), grouped-query attention, SwiGLU, optional biases on q/k/v
(Qwen2), norms on q and k (Qwen3), tied or untied embeddings. Parameter names are Hugging Face's, so a folder of
weights loads without translation, and adapters of the peft library attach by the names people know.

Every product runs over all packed rows at once and every other operation is row-wise, in forms whose result does not
depend on where a value lies in memory: a token's hidden state is the same bits in a training batch and in decoding.

Shapes: T packed tokens, D width, H query heads, K key/value heads, d head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upslope import kernels
from upslope.errors import ModelError
from upslope.kernels import rows
from upslope.kernels.products import PackedWeights, joined_linear, lay_end_to_end, least_rows, linear, pad_rows
from upslope.models.protocol import CausalModel, Context, ModelSpec

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ARCHITECTURES = {kind: f"{kind.capitalize()}ForCausalLM" for kind in MODEL_TYPES}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_PLAIN = (*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")
"""Fields that a config.json has under the same name, in its order."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder; field names and meanings are those of a Hugging Face config.json."""

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read a config.json. Raises ModelError where the network would differ from ours."""
        kind = config.get("model_type", "")
        if kind not in MODEL_TYPES:
            raise ModelError(f"model_type {kind!r} is not one of {', '.join(MODEL_TYPES)}")
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ModelError(f"{kind}: activation {config['hidden_act']!r} is not supported, only silu")
        if config.get("mlp_bias"):
            raise ModelError(f"{kind}: mlp_bias=true is not supported")
        heads = config["num_attention_heads"]
        known = {
            *(*_PLAIN, "model_type", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias"),
            *("tie_word_embeddings", "initializer_range", "architectures", "dtype", "torch_dtype"),
            "transformers_version",
        }
        return cls(
            model_type=kind,
            **{name: config[name] for name in _SIZES},
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=_rope_of(config),
            attention_bias=kind == "qwen2" or bool(config.get("attention_bias", False)),
            output_bias=kind != "qwen2" and bool(config.get("attention_bias", False)),
            qk_norm=kind == "qwen3",
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            initializer_range=config.get("initializer_range", 0.02),
            extra={k: v for k, v in config.items() if k not in known},
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers reads back into the same network."""
        scaling = {k: v for k, v in self.rope.items() if k != "rope_theta"}
        return {
            **self.extra,
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            **{name: getattr(self, name) for name in _PLAIN},
            "hidden_act": "silu",
            "rope_parameters": dict(self.rope),
            "rope_theta": self.rope["rope_theta"],
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            **({"rope_scaling": scaling} if self.rope["rope_type"] != "default" else {}),
            **({"attention_bias": self.attention_bias} if self.model_type in ("llama", "qwen3") else {}),
        }


def _rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """One form for the two ways in which folders write rotary parameters."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ModelError(f"rope type {rope['rope_type']!r} is not supported: default, linear and llama3 are")
    return rope


def rope_frequencies(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """Angular frequency of each pair of dimensions, float64 [d / 2] (RoFormer, arXiv 2104.09864, eq. 15).

    "linear" divides all by a factor; "llama3" divides the long wavelengths and blends in between (Llama 3.1).
    """
    inverse = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if rope["rope_type"] == "linear":
        return inverse / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)
        share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - share) * inverse / rope["factor"] + share * inverse
    return inverse


def rotate(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Rotary embedding in float32, the halves paired as Hugging Face does, cast back to x's dtype.

    cos and sin are [T, d / 2].
    """
    first, second = x_THd.to(cos_Td.dtype).chunk(2, dim=-1)
    cos, sin = cos_Td[:, None], sin_Td[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_THd.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight with the mean square in float32 (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if kernels.usable(x, self.weight):
            return rows.rms_norm(x, self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and the norm of it."""
        if kernels.usable(x, delta, self.weight):
            return rows.add_rms_norm(x, delta, self.weight, self.eps)
        total = x + delta
        return total, self(total)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, with silu as gate / (1 + exp(-gate)).

    torch's own silu and sigmoid evaluate the tail of a row by another routine than its vectorised body, so the same
    number can differ in its last bit with its place in memory; exp and division do not.
    """

    @staticmethod
    def forward(ctx, gate, up):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
        return (wide / wide.neg().exp_().add_(1)).to(gate.dtype) * up

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
        sigmoid = wide.neg().exp_().add_(1).reciprocal_()
        silu = wide * sigmoid
        slope = sigmoid + silu * (1 - sigmoid)
        return (grad * up * slope).to(gate.dtype), grad * silu.to(gate.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv 2305.13245) with rotary positions."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, kv_width = self.heads * config.head_dim, self.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm
        self.scale = config.head_dim**-0.5

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: Context) -> Tensor:
        real = context.positions_T.shape[0]
        everything = joined_linear(x, self.q_proj, self.k_proj, self.v_proj, packed=context.packed)[:real]
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        if self.qk_norm:
            q, k, v = everything.view(real, -1, self.head_dim).split(sizes, dim=1)
            everything = torch.cat([self.q_norm(q), self.k_norm(k), v], dim=1).flatten(1)
        if self.head_dim % 2 == 0 and kernels.usable(everything):
            q, k, v = rows.split_rotate(everything, cos, sin, heads=self.heads, kv_heads=self.kv_heads)
        else:
            q, k, v = everything.view(real, -1, self.head_dim).split(sizes, dim=1)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = context.attend(self.layer, q, k, v, self.scale).flatten(1)
        extra = x.shape[0] - real
        return linear(F.pad(out, (0, 0, 0, extra)) if extra else out, self.o_proj, context.packed)


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, packed: PackedWeights | None = None) -> Tensor:
        both = joined_linear(x, self.gate_proj, self.up_proj, packed=packed)
        if not kernels.usable(both):
            return linear(_SwiGLU.apply(*both.chunk(2, dim=-1)), self.down_proj, packed)
        if torch.is_grad_enabled() and type(self.down_proj) is nn.Linear:
            return rows.swiglu_linear(both, self.down_proj.weight)
        return linear(rows.swiglu(both), self.down_proj, packed)


class Layer(nn.Module):
    """Pre-norm Transformer block.

    Takes the residual stream and what the block before has to add to it, and returns the same two: the sum is made
    together with the norm that follows.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, context: Context
    ) -> tuple[Tensor, Tensor]:
        if delta is None:
            normed = self.input_layernorm(x)
        else:
            x, normed = self.input_layernorm.add(x, delta)
        x, normed = self.post_attention_layernorm.add(x, self.self_attn(normed, cos, sin, context))
        return x, self.mlp(normed, context.packed)


class _Trunk(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(CausalModel):
    """The decoder with random weights (normal, `initializer_range`); models.files.loading fills it from a folder."""

    captures = True

    def __init__(self, config: DecoderConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__(config, gradient_checkpointing)
        if config.num_attention_heads % config.num_key_value_heads:
            raise ModelError(
                f"{config.num_attention_heads} query heads cannot share {config.num_key_value_heads} key heads evenly"
            )
        self.model = _Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("rope_inverse", rope_frequencies(config.rope, config.head_dim), persistent=False)
        self.apply(self._init)
        self.join_projections()
        products = [m.weight.numel() for m in self.model.modules() if isinstance(m, nn.Linear)]
        self.least_rows = least_rows(min(products))
        self.spec = ModelSpec(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
            intermediate_size=config.intermediate_size,
            parameters=sum(p.numel() for p in self.parameters()),
        )

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Decoder:
        """Cast and move everything but the rotary frequencies, which stay float64."""
        inverse = self.rope_inverse
        super()._apply(fn, recurse)
        self.rope_inverse = inverse.to(self.rope_inverse.device)
        self.join_projections()
        return self

    def join_projections(self) -> None:
        """Lay the weights of projections that read the same rows end to end, so that they are one matrix."""
        for module in self.model.modules():
            if isinstance(module, Attention):
                lay_end_to_end(module.q_proj, module.k_proj, module.v_proj)
            elif isinstance(module, MLP):
                lay_end_to_end(module.gate_proj, module.up_proj)

    @property
    def output_weight(self) -> Tensor:
        """The output embedding [V, D]."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens_T: Tensor, context: Context) -> Tensor:
        """Hidden states [T, D] after the last norm, for tokens int64 [T] that stand where `context` says."""
        cos, sin = self.angles(context.positions_T)
        x, delta = F.embedding(pad_rows(tokens_T, least=self.least_rows), self.model.embed_tokens.weight), None
        for layer in self.model.layers:
            x, delta = self.run(layer, x, delta, cos, sin, context)
        return (self.model.norm(x) if delta is None else self.model.norm.add(x, delta)[1])[: tokens_T.shape[0]]

    def angles(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, d / 2] of the rotary angles, float32 or wider."""
        angles = positions_T[:, None].double() * self.rope_inverse
        stat = torch.promote_types(self.dtype, torch.float32)
        return angles.cos().to(stat), angles.sin().to(stat)
