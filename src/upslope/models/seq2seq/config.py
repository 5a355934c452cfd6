"""The shape of an encoder-decoder, and its two forms on disk: Marian's (norm after) and Pegasus' (norm before)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from upslope.errors import ConfigError, ModelError

SEQ2SEQ_TYPES = ("marian", "pegasus")
ACTIVATIONS = ("relu", "gelu", "silu", "swish")
_ARCHITECTURES = {"marian": "MarianMTModel", "pegasus": "PegasusForConditionalGeneration"}
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "encoder_layers", "decoder_layers"),
    *("num_attention_heads", "max_position_embeddings"),
)
_NAMES = {
    "d_model": "hidden_size",
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "encoder_ffn_dim": "intermediate_size",
    "decoder_ffn_dim": "intermediate_size",
    "encoder_attention_heads": "num_attention_heads",
    "decoder_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "activation_function": "activation",
    "scale_embedding": "scale_embedding",
    "dropout": "dropout",
    "pad_token_id": "pad_token_id",
    "eos_token_id": "eos_token_id",
    "decoder_start_token_id": "decoder_start_token_id",
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
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"hidden_size = {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if self.norm not in ("post", "pre"):
            raise ConfigError(f"norm = {self.norm!r}: must be post or pre")
        if self.norm == "pre" and self.source_vocab_size is not None:
            raise ConfigError("norm = 'pre' needs one shared vocabulary: leave source_vocab_size out or take norm post")
        if self.source_vocab_size is not None and self.source_vocab_size < 1:
            raise ConfigError(f"source_vocab_size = {self.source_vocab_size}: must be at least 1, or left out")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation = {self.activation!r}: must be one of {', '.join(ACTIVATIONS)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout = {self.dropout}: must be in [0, 1)")
        ids = {"pad_token_id": self.pad_token_id, "decoder_start_token_id": self.decoder_start_token_id}
        if isinstance(self.eos_token_id, int):
            ids["eos_token_id"] = self.eos_token_id
        for name, value in ids.items():
            if not isinstance(value, int) or not 0 <= value < self.vocab_size:
                raise ConfigError(f"{name} = {value}: must be a target token, 0..{self.vocab_size - 1}")
        if self.source_vocab_size is not None and self.pad_token_id >= self.source_vocab_size:
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
        config: dict[str, Any] = {
            **{"attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
            **{"bos_token_id": None, "forced_eos_token_id": None},
            **self.extra,
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "is_encoder_decoder": True,
            "vocab_size": self.vocab_size if self.source_vocab_size is None else self.source_vocab_size,
            **{name: getattr(self, field) for name, field in _NAMES.items()},
            "tie_word_embeddings": True,
        }
        if self.model_type == "marian":
            config["decoder_vocab_size"] = self.vocab_size
            config["share_encoder_decoder_embeddings"] = self.source_vocab_size is None
        return config

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
