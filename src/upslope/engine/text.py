"""Tokens to text while they arrive: whole characters only, stop strings found across token borders. No torch."""

from typing import Protocol


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of the tokens; bytes that are no whole character become U+FFFD."""
        ...


class TextStream:
    """The text of one completion.

    `text` ends before the first stop string. `take` hands out what can no longer change: bytes of an unfinished
    character and a tail that may become a stop string are held back until they are decided or the end has come;
    the pieces taken add up to `text`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.text = ""
        self.stopped = False
        self._ids: list[int] = []
        self._context = 0  # decoding starts here, so that a word's first token keeps its leading space
        self._read = 0  # tokens whose text is in `text`
        self._context_text = ""
        self._taken = 0
        self._final = False

    def push(self, tokens: list[int], *, final: bool = False) -> bool:
        """Add tokens; True when a stop string has been completed. `final` flushes what was held back."""
        if self.stopped:
            return True
        self._final = final
        self._ids += tokens
        window = self.tokenizer.decode(self._ids[self._context :], skip_special_tokens=True)
        if not window.endswith("\ufffd") or final:
            self._append(window[len(self._context_text) :])
        return self.stopped

    def take(self) -> str:
        """The newly decided text since the last call."""
        end = len(self.text) if self._final or self.stopped else len(self.text) - self._held()
        piece, self._taken = self.text[self._taken : end], max(self._taken, end)
        return piece

    def _append(self, piece: str) -> None:
        if piece:
            self._context, self._read = self._read, len(self._ids)
            self._context_text = self.tokenizer.decode(self._ids[self._context : self._read], skip_special_tokens=True)
        before = len(self.text)
        self.text += piece
        hits = [self.text.find(s, max(0, before - len(s) + 1)) for s in self.stop]
        found = [hit for hit in hits if hit >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held(self) -> int:
        """Length of the longest tail that begins a stop string."""
        longest = max((len(s) for s in self.stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(len(s) > length and s.startswith(self.text[-length:]) for s in self.stop):
                return length
        return 0
