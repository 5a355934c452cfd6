"""Tokenising a text in pieces, each as the model meets it: right after the tokens of the piece before.

A sampler sees the prompt's tokens and then adds its own; tokenising prompt and reply as one string may merge across
that border (or split differently before it), and then the trained tokens are not the sampled ones. So a border
between prompt and reply is always a border between tokens.

Tokenizers of the SentencePiece kind put a word mark in front of a text's first word. A piece that continues a text
must not get one; `encode_pieces` leaves it out there and nowhere else.

An encoder-decoder's two tokenizers are a `PairTokenizer`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from upslope.errors import DataError, ModelError, is_rust_error, located, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as FastTokenizer
else:
    FastTokenizer = Any


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
    tokenizer: FastTokenizer, text: str, cuts: Sequence[int], *, continues: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of `text` with a token border at every character position in `cuts` (ascending).

    Nothing is added (no BOS, no EOS). `continues` says that the text itself follows other text.
    Returns (ids, starts): starts[t] is the character of `text` at which token t begins.
    """
    ids: list[int] = []
    starts: list[int] = []
    for low, high in pairwise([0, *cuts, len(text)]):
        for begin, end, bare in _sections(tokenizer, text, low, high, continues or low > 0):
            new_ids, new_starts = _encode(tokenizer, text[begin:end], bare)
            ids.extend(new_ids)
            starts.extend(begin + start for start in new_starts)
    return ids, starts


def closing_special(tokenizer: FastTokenizer, text: str) -> str | None:
    """The special token that ends `text` (the longest that fits), or None."""
    return max(filter(text.endswith, _facts(tokenizer).specials), key=len, default=None)


def _sections(tokenizer: FastTokenizer, text: str, low: int, high: int, follows: bool) -> list[tuple[int, int, bool]]:
    """(begin, end, without word mark) parts of a piece; only what precedes its first special token may go without."""
    facts, border = _facts(tokenizer), low
    after_special = low > 0 and text.endswith(facts.specials, 0, low)
    if facts.bare is not None and follows and not (after_special and facts.marks_each_section):
        special = facts.pattern.search(text, low, high) if facts.pattern else None
        border = special.start() if special else high
    return [(begin, end, bare) for begin, end, bare in ((low, border, True), (border, high, False)) if begin < end]


def _encode(tokenizer: FastTokenizer, text: str, bare: bool) -> tuple[list[int], list[int]]:
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


def _facts(tokenizer: FastTokenizer) -> _Facts:
    facts = _FACTS.get(tokenizer)
    if facts is None or facts.size != len(tokenizer):  # tokens may be added to a tokenizer after its first use
        facts = _FACTS[tokenizer] = _derive(tokenizer)
    return facts


def _derive(tokenizer: FastTokenizer) -> _Facts:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    specials = tuple(sorted({*added, *tokenizer.all_special_tokens} - {""}))
    longest_first = sorted(specials, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first))) if specials else None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    schemes = _drop_word_marks(state)
    bare = plain_backend(json.dumps(state)) if schemes else None
    return _Facts(len(tokenizer), specials, pattern, bare, "always" in schemes)


def plain_backend(state: str) -> Any:
    """A serialised tokenizer that neither cuts nor pads."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(state)
    made.no_truncation()
    made.no_padding()
    return made


def _drop_word_marks(state: dict[str, Any]) -> set[str]:
    """Edit a serialised tokenizer so that it marks no first word; returns where it did ("first", "always")."""
    schemes: set[str] = set()
    for part in steps_of(state, "pre_tokenizer"):
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            schemes.add(part.get("prepend_scheme", "always"))
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            schemes.add("always")
            part["add_prefix_space"] = False
    steps = steps_of(state, "normalizer")
    if (kept := [part for part in steps if part["type"] != "Prepend"]) != steps:
        schemes.add("always")
        state["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    return schemes


def steps_of(state: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """The steps of a serialised tokenizer's "normalizer" or "pre_tokenizer"."""
    if (whole := state.get(part)) is None or whole["type"] != "Sequence":
        return [] if whole is None else [whole]
    return list(whole[{"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[part]])


SOURCE_FOLDER = "source_tokenizer"


@dataclass(eq=False)
class PairTokenizer:
    """The tokenizer of an encoder-decoder: a source text becomes the prompt, a target text the completion.

    A prompt is [source ids..., source EOS, decoder_start]; with separate vocabularies a source id s stands there as
    source_offset + s (the number of target tokens plus s), so that one token list holds both sides. Everything a reader
    of completions asks of a tokenizer (EOS, padding, decode) is the target's. source: None where it is the target's.

    source_offset: 0 where both sides share one vocabulary, else the model's number of target tokens. Raises ModelError
    when a side has no EOS, or decoder_start_token_id could not be told from a source's end.
    """

    chat_template: ClassVar[None] = None

    target: FastTokenizer
    source: FastTokenizer | None = None
    _: KW_ONLY
    decoder_start_token_id: int
    source_offset: int = 0

    def __post_init__(self) -> None:
        if (self.source is None) != (self.source_offset == 0):
            raise ModelError("a source tokenizer of its own goes with a source_offset, the number of target tokens")
        self.source = self.target if self.source is None else self.source
        self.eos_token_id: int = self.target.eos_token_id
        self.pad_token_id: int | None = self.target.pad_token_id
        self.bos_token_id: int | None = self.target.bos_token_id  # a target begins with decoder_start
        for side, tokenizer in (("target", self.target), ("source", self.source)):
            if tokenizer.eos_token_id is None:
                raise ModelError(f"the {side} tokenizer has no EOS token: set its eos_token")
        if self.decoder_start_token_id == self.source.eos_token_id + self.source_offset:
            raise ModelError(
                f"decoder_start_token_id {self.decoder_start_token_id} is also the source's EOS token, so a source's "
                "end could not be found: use the padding token, and give EOS a token of its own"
            )

    def __len__(self) -> int:
        """Target tokens."""
        return len(self.target)

    def source_ids(self, text: str) -> list[int]:
        """The prompt's tokens of a source text: its ids, the source's EOS, decoder_start.

        Raises DataError for a text without tokens, or one that holds decoder_start's own text.
        """
        ids, _ = encode_pieces(self.source, text, ())
        if not ids:
            raise DataError("the source text has no tokens")
        if not self.source_offset and self.decoder_start_token_id in ids:
            token = self.target.convert_ids_to_tokens(self.decoder_start_token_id)
            raise DataError(f"the source text holds {token!r}, which marks the beginning of the target: take it out")
        eos = self.source.eos_token_id
        ids = ids if ids[-1] == eos else [*ids, eos]
        return [*(self.source_offset + i for i in ids), self.decoder_start_token_id]

    def target_ids(self, text: str) -> list[int]:
        """The tokens of a target text and EOS."""
        ids, _ = encode_pieces(self.target, text, ())
        return ids if ids[-1:] == [self.eos_token_id] else [*ids, self.eos_token_id]

    def decode(self, token_ids: int | Sequence[int], *, skip_special_tokens: bool = False, **options: Any) -> str:
        """Text of the tokens; runs of source ids (separate vocabularies) are the source tokenizer's."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        options["skip_special_tokens"] = skip_special_tokens
        if not self.source_offset or all(i < self.source_offset for i in ids):
            return self.target.decode(ids, **options)
        sides = {False: (0, self.target), True: (self.source_offset, self.source)}
        runs = ((*sides[is_source], run) for is_source, run in groupby(ids, key=lambda i: i >= self.source_offset))
        return "".join(tokenizer.decode([i - shift for i in run], **options) for shift, tokenizer, run in runs)

    def convert_ids_to_tokens(self, token_id: int) -> str:
        """The vocabulary's own name of a token."""
        if self.source_offset and token_id >= self.source_offset:
            return self.source.convert_ids_to_tokens(token_id - self.source_offset)
        return self.target.convert_ids_to_tokens(token_id)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the target's files, and a source tokenizer of its own into the subfolder source_tokenizer."""
        self.target.save_pretrained(str(save_directory))
        if self.source is not self.target:
            self.source.save_pretrained(str(Path(save_directory) / SOURCE_FOLDER))


def pair_tokenizer(
    folder: Path, config: Mapping[str, Any], target: FastTokenizer, source: FastTokenizer | None
) -> PairTokenizer:
    """The pair of an encoder-decoder's folder. Raises ModelError, naming the folder, where its parts do not fit."""
    start, separate = config.get("decoder_start_token_id"), config.get("share_encoder_decoder_embeddings") is False
    if not isinstance(start, int):
        raise ModelError(f"{folder}: config.json has no decoder_start_token_id; get the folder again")
    if separate != (source is not None):
        found, wanted = ("no", "one") if separate else ("a", "none")
        raise ModelError(
            f"{folder}: {found} {SOURCE_FOLDER}/ in it, but share_encoder_decoder_embeddings = {not separate} in "
            f"config.json calls for {wanted}"
        )
    rows = config.get("vocab_size")
    offset = (config.get("decoder_vocab_size") or rows or 0) if separate else 0
    with located(folder, ModelError):
        pair = PairTokenizer(target, source, decoder_start_token_id=start, source_offset=offset)
    for side, tokenizer, most in (("target", target, offset if separate else rows), ("source", pair.source, rows)):
        if isinstance(most, int) and len(tokenizer) > most:
            size = len(tokenizer)
            raise ModelError(f"{folder}: the {side} tokenizer has {size} tokens but the model embeds only {most}")
    return pair
