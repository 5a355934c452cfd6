"""The bytes of single tokens, and text that names them: what log-probs are listed under.

A token need not be a whole character, so its text is not always text: `text` then gives OpenAI's notation for bytes,
"bytes:\\xe2\\x80", which differs for different bytes where U+FFFD would not.
"""

import codecs
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode


class Pieces:
    """What each token of a tokenizer stands for, looked up once per token: its bytes (`raw`), its `text`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        self._table = letters if '"ByteLevel"' in decoder else None
        self._metaspace = '"ByteFallback"' in decoder or '"Metaspace"' in decoder
        added = tokenizer.added_tokens_decoder
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self.raw: Callable[[int], bytes] = cache(self._spell)
        self.text: Callable[[int], str] = cache(self._written)

    def _written(self, token: int) -> str:
        """The token as text, or as "bytes:\\x.." where its bytes are no whole characters."""
        raw = self.raw(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def special(self, token: int) -> bool:
        """Whether the token is left out of a completion's text."""
        return token in self._special

    def by_text(self, alternatives: dict[int, float]) -> dict[str, float]:
        """Log-probs by token text; of two tokens with the same text the likelier one stays."""
        best: dict[str, float] = {}
        for token, logprob in alternatives.items():
            text = self.text(token)
            best[text] = max(logprob, best.get(text, logprob))
        return best

    def _spell(self, token: int) -> bytes:
        """The bytes that a token adds to the text; those of a special token's name."""
        if token in self._added:
            return self._added[token].encode("utf-8")
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # an id of the network's vocabulary that the tokenizer has no name for
            return b""
        if self._table is not None:
            return bytes(self._table[letter] for letter in piece if letter in self._table)
        if self._metaspace:
            named = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
            return bytes.fromhex(named[1]) if named else piece.replace("\u2581", " ").encode("utf-8")
        return self._tokenizer.decode([token]).encode("utf-8")


class Offsets:
    """Where tokens begin in the text they make, in characters, as they come one after the other."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Sequence[int], *, prompt: str | None = None) -> list[int]:
        """The offsets of the next tokens; a token that begins inside a character has the character's own.

        Special tokens are not in the text, but for those of a `prompt`, whose text may show them.
        """
        offsets = []
        for token in tokens:
            offsets.append(self._at)
            shown = prompt is not None and prompt.startswith(self._pieces.text(token), self._at)
            if shown or not self._pieces.special(token):
                self._at += len(self._decoder.decode(self._pieces.raw(token)))
        return offsets
