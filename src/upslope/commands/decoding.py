"""What `generate` and `chat` share: an engine for their options, text that is safe to show."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from upslope.atomic import read_object
from upslope.build import Policy
from upslope.engine import Engine
from upslope.errors import ModelError
from upslope.models.attention.context import BLOCK, KVCache
from upslope.models.files.folders import GENERATION_CONFIG
from upslope.models.files.sources import say
from upslope.options.inference import DecodingOptions

# A model's text may hold escape sequences, which a terminal would obey: retitle, recolour, overwrite what was said.
_HARMLESS = {ord("\n"), ord("\t")}
DRAWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
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


def suggested(folder: Path, left: Iterable[str]) -> str:
    """What the model's generation_config.json suggests of the options `left` at their defaults, as they are written.

    Nothing of it is taken: the same options give the same distribution whatever lies in the model's folder.
    """
    path = folder / GENERATION_CONFIG
    said = read_object(path, ModelError) if path.is_file() else {}
    greedy = said.get("do_sample") is False
    names = [n for n in left if not greedy or n == "repetition_penalty"]
    values = [(n, said[n]) for n in names if isinstance(said.get(n), int | float) and said[n] != _OFF.get(n)]
    return " ".join(f"--{n.replace('_', '-')} {value:g}" for n, value in values)


def say_suggested(policy: Policy, options: DecodingOptions) -> None:
    """One line on standard error where the model suggests what the options leave out."""
    fields = type(options).__dataclass_fields__
    left = [name for name in DRAWN if getattr(options, name) == fields[name].default]
    if options.temperature == 0:
        left = [name for name in left if name == "repetition_penalty"]
    if words := suggested(policy.folder, left):
        say(f"{options.model}: its {GENERATION_CONFIG} suggests {words}; not taken unless you say so")


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template; an encoder-decoder's never has."""
    return getattr(tokenizer, "chat_template", None) is not None


def shown(text: str, stream: TextIO) -> str:
    """`text` as it may be written to `stream`: for a terminal, control characters become their pictures."""
    return text.translate(_SHOWN) if stream.isatty() else text
