"""Tokenising a text in pieces, each as the model meets it: right after the tokens of the piece before.

A sampler sees the prompt's tokens and then adds its own; tokenising prompt and reply as one string may merge across
that border (or split differently before it), and then the trained tokens are not the sampled ones. So a border
between prompt and reply is always a border between tokens.

Tokenizers of the SentencePiece kind put a word mark in front of a text's first word. A piece that continues a text
must not get one; `encode_pieces` leaves it out there and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from upslope.errors import DataError, is_rust_error, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is derived once per tokenizer. `bare` is the backend without the word mark, None where there is no mark."""

    size: int
    specials: tuple[str, ...]
    pattern: re.Pattern[str] | None
    bare: Any
    marks_each_section: bool


_FACTS: WeakKeyDictionary[Any, _Facts] = WeakKeyDictionary()


def encode_pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, cuts: Sequence[int], *, continues: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of `text` with a token border at every character position in `cuts` (ascending).

    Nothing is added (no BOS, no EOS). `continues` says that the text itself follows other text.
    Returns (ids, starts): starts[t] is the character of `text` at which token t begins.
    """
    ids: list[int] = []
    starts: list[int] = []
    edges = [0, *cuts, len(text)]
    for low, high in pairwise(edges):
        if low == high:
            continue
        follows = continues if low == 0 else True
        for begin, end, bare in _sections(tokenizer, text, low, high, follows):
            new_ids, new_starts = _encode(tokenizer, text[begin:end], bare)
            ids.extend(new_ids)
            starts.extend(begin + start for start in new_starts)
    return ids, starts


def closing_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """The special token that ends `text` (the longest that fits), or None."""
    matches = [token for token in _facts(tokenizer).specials if text.endswith(token)]
    return max(matches, key=len) if matches else None


def _sections(
    tokenizer: PreTrainedTokenizerBase, text: str, low: int, high: int, follows: bool
) -> list[tuple[int, int, bool]]:
    """(begin, end, without word mark) parts of a piece; only what precedes its first special token may go without."""
    facts = _facts(tokenizer)
    if facts.bare is None or not follows:
        return [(low, high, False)]
    after_special = low > 0 and any(text.endswith(token, 0, low) for token in facts.specials)
    if after_special and facts.marks_each_section:
        return [(low, high, False)]
    special = facts.pattern.search(text, low, high) if facts.pattern else None
    border = special.start() if special else high
    return [(begin, end, bare) for begin, end, bare in ((low, border, True), (border, high, False)) if begin < end]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, bare: bool) -> tuple[list[int], list[int]]:
    try:
        if bare:
            encoding = _facts(tokenizer).bare.encode(text, add_special_tokens=False)
            return list(encoding.ids), [start for start, _ in encoding.offsets]
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except BaseException as error:
        if not is_rust_error(error):
            raise
        raise DataError(f"the tokenizer cannot encode {text!r:.40} ({one_line(error)}); mend tokenizer.json") from error
    return list(encoding["input_ids"]), [start for start, _ in encoding["offset_mapping"]]


def _facts(tokenizer: PreTrainedTokenizerBase) -> _Facts:
    facts = _FACTS.get(tokenizer)
    if facts is None or facts.size != len(tokenizer):  # tokens may be added to a tokenizer after its first use
        facts = _derive(tokenizer)
        _FACTS[tokenizer] = facts
    return facts


def _derive(tokenizer: PreTrainedTokenizerBase) -> _Facts:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    specials = tuple(sorted({*added, *tokenizer.all_special_tokens} - {""}))
    longest_first = sorted(specials, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first))) if specials else None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    schemes = _drop_word_marks(state)
    bare = None
    if schemes:
        from tokenizers import Tokenizer

        bare = Tokenizer.from_str(json.dumps(state))
        bare.no_truncation()
        bare.no_padding()
    return _Facts(len(tokenizer), specials, pattern, bare, "always" in schemes)


def _drop_word_marks(state: dict[str, Any]) -> set[str]:
    """Edit a serialised tokenizer so that it marks no first word; returns where it did ("first", "always")."""
    schemes: set[str] = set()
    for part in _steps(state.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            schemes.add(part.get("prepend_scheme", "always"))
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            schemes.add("always")
            part["add_prefix_space"] = False
    normalizer = state.get("normalizer")
    for part in _steps(normalizer, "normalizers"):
        if part["type"] == "Prepend":
            schemes.add("always")
    if normalizer and normalizer["type"] == "Prepend":
        state["normalizer"] = None
    elif normalizer and normalizer["type"] == "Sequence":
        normalizer["normalizers"] = [part for part in normalizer["normalizers"] if part["type"] != "Prepend"]
    return schemes


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]
