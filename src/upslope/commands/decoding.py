"""What `generate` and `chat` share: an engine for their options, text that is safe to show."""

from __future__ import annotations

from typing import Any, TextIO

from upslope.build import Policy
from upslope.engine import Engine
from upslope.models.attention import BLOCK, KVCache

__all__ = ["has_template", "open_engine", "shown"]

# A model's text may hold escape sequences, which a terminal would obey: retitle, recolour, overwrite what was said.
_HARMLESS = {ord("\n"), ord("\t")}
_SHOWN: dict[int, int] = {c: 0x2400 + c for c in range(32) if c not in _HARMLESS} | {0x7F: 0x2421}
_SHOWN |= dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


def open_engine(policy: Policy, *, sequences: int, longest: int, max_batch: int, kv_cache_gb: float) -> Engine:
    """An engine whose cache holds `sequences` of up to `longest` tokens, but takes no more than kv_cache_gb (GiB)."""
    blocks = min(sequences, max_batch) * -(-(longest + 1) // BLOCK)
    most = int(kv_cache_gb * 2**30 // KVCache.bytes_per_block(policy.model.spec, policy.model.dtype))
    return Engine(
        policy.model,
        policy.tokenizer,
        eos_token_ids=policy.eos_token_ids,
        max_batch=max_batch,
        num_blocks=min(blocks, most),
    )


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template; an encoder-decoder's never has."""
    return getattr(tokenizer, "chat_template", None) is not None


def shown(text: str, stream: TextIO) -> str:
    """`text` as it may be written to `stream`: for a terminal, control characters become their pictures."""
    return text.translate(_SHOWN) if stream.isatty() else text
