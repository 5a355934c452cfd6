"""What a transformers configuration says about a network: its limits, its scales, and why it cannot run here."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from upslope.errors import ModelError

__all__ = ["intermediate_size", "logit_scale", "max_positions", "refusal", "sliding_window"]

_LOGIT_SCALES = {"logit_scale": 1.0, "logits_scaling": -1.0}
"""Configuration keys of a constant that multiplies (+1, Cohere) or divides (-1, Granite) the logits."""


def refusal(config: PreTrainedConfig, network: PreTrainedModel | None = None) -> str | None:
    """Why this configuration (and network, once built) cannot run through the adapter, or None if nothing says so."""
    get = config.to_dict().get
    kinds = set(get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    window = sliding_window(config)
    softcap = next((key for key in ("attn_logit_softcapping", "final_logit_softcapping") if get(key)), None)
    if config.is_encoder_decoder:
        return "is an encoder-decoder"
    if config.get_text_config() is not config:
        return "takes more than text"
    if get("quantization_config"):
        return "has quantised weights; take the unquantised model"
    if kinds:
        return f"has layers other than full attention ({', '.join(sorted(kinds))})"
    if window is not None:
        return f"has a sliding window of {window}, shorter than its context"
    if get("attention_chunk_size"):
        return "attends in chunks"
    if softcap:
        return f"caps its logits ({softcap})"
    if get("alibi") or get("position_embedding_type") == "alibi":
        return "adds position biases to the scores (ALiBi)"
    if network is None:
        return None
    if getattr(network, "_is_stateful", False):
        return "keeps a recurrent state"
    if not network._supports_attention_backend:
        return "does not call transformers' attention interface"
    if any(name.rpartition(".")[2] == "sinks" for name, _ in network.named_parameters()):
        return "uses attention sinks"
    return None


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The sliding window in effect, or None when every token of the longest context sees all before it."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    if types and "sliding_attention" not in types:
        return None
    return window if window < max_positions(config) else None


def max_positions(config: PreTrainedConfig) -> int:
    """The longest sequence whose numbers do not depend on the other sequences of the pack.

    "dynamic" and "longrope" rotary positions change with the longest position of a call once it passes the original
    context, so they are used up to there.
    """
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if positions is None:
        raise ModelError("its configuration does not say max_position_embeddings")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings")
        positions = min(positions, original or getattr(config, "original_max_position_embeddings", None) or positions)
    return int(positions)


def logit_scale(config: PreTrainedConfig) -> float:
    """The constant that multiplies the logits."""
    for key, power in _LOGIT_SCALES.items():
        value = getattr(config, key, None)
        if isinstance(value, int | float):
            return float(value) ** power
    return 1.0


def intermediate_size(config: PreTrainedConfig) -> int:
    """Width of the feed-forward layers (an estimate of 4 D where the configuration does not say)."""
    for key in ("intermediate_size", "ffn_dim", "n_inner"):
        if isinstance(size := getattr(config, key, None), int):
            return size
    return 4 * config.hidden_size
