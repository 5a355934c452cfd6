"""The tokenizer of an encoder-decoder: a source text becomes the prompt, a target text the completion.

A prompt is [source ids..., source EOS, decoder_start]; with separate vocabularies a source id s stands there as
source_offset + s (the number of target tokens plus s), so that one token list holds both sides. Everything a reader
of completions asks of a tokenizer (EOS, padding, decode) is the target's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upslope.data.pieces import encode_pieces
from upslope.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE_FOLDER = "source_tokenizer"


class PairTokenizer:
    """Target tokenizer, source tokenizer (None: the same), and where the source's ids lie in token lists.

    source_offset: 0 where both sides share one vocabulary, else the model's number of target tokens. Raises ModelError
    when a side has no EOS, or decoder_start_token_id could not be told from a source's end.
    """

    chat_template: None = None

    def __init__(
        self,
        target: PreTrainedTokenizerBase,
        source: PreTrainedTokenizerBase | None = None,
        *,
        decoder_start_token_id: int,
        source_offset: int = 0,
    ) -> None:
        if (source is None) != (source_offset == 0):
            raise ModelError("a source tokenizer of its own goes with a source_offset, the number of target tokens")
        self.target = target
        self.source = target if source is None else source
        self.eos_token_id: int = target.eos_token_id
        self.pad_token_id: int | None = target.pad_token_id
        self.bos_token_id: int | None = target.bos_token_id  # a target begins with decoder_start
        self.decoder_start_token_id = decoder_start_token_id
        self.source_offset = source_offset
        for side, tokenizer in (("target", target), ("source", self.source)):
            if tokenizer.eos_token_id is None:
                raise ModelError(f"the {side} tokenizer has no EOS token: set its eos_token")
        if decoder_start_token_id == self.source.eos_token_id + source_offset:
            raise ModelError(
                f"decoder_start_token_id {decoder_start_token_id} is also the source's EOS token, so a source's end "
                "could not be found: use the padding token, and give EOS a token of its own"
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
        parts = []
        for is_source, run in groupby(ids, key=lambda i: i >= self.source_offset):
            shift, tokenizer = (self.source_offset, self.source) if is_source else (0, self.target)
            parts.append(tokenizer.decode([i - shift for i in run], **options))
        return "".join(parts)

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
    folder: Path, config: Mapping[str, Any], target: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase | None
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
    offset = (config.get("decoder_vocab_size") or config.get("vocab_size") or 0) if separate else 0
    try:
        pair = PairTokenizer(target, source, decoder_start_token_id=start, source_offset=offset)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    sizes = [("target", len(target), offset if separate else config.get("vocab_size"))]
    if source is not None:
        sizes.append(("source", len(source), config.get("vocab_size")))
    for side, size, most in sizes:
        if isinstance(most, int) and size > most:
            raise ModelError(f"{folder}: the {side} tokenizer has {size} tokens but the model embeds only {most}")
    return pair
