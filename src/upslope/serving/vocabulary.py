"""What a tokenizer's tokens stand for: the bytes and the text of single ones, and which may come next in a grammar.

A token need not be a whole character, so its text is not always text: `Pieces.text` then gives OpenAI's notation for
bytes, "bytes:\\xe2\\x80", which differs for different bytes where U+FFFD would not.

Output that follows a grammar: the library llguidance says which tokens may come next, the engine draws from them. Tool
calls have grammars in the form that `data.tool_calls` reads: for calls that must come, and for those that may. JSON is
written on one line with ", " and ": " between its parts, the form that models have seen most; a grammar that leaves
white space open lets a model fill its budget with it.
"""

from __future__ import annotations

import codecs
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from upslope.data.messages import CLOSE, OPEN
from upslope.errors import ConfigError, DataError
from upslope.extras import require

_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_STRICT = {"lenient": False, "coerce_one_of": False}
MAX_GRAMMAR = 100_000
"""Characters; the time that compiling takes grows with the square of some grammars' size."""
_MAX_MESSAGE = 500
_NOTHING_FOLLOWS = ("NoExtension", "NoExtensionBias")
_LISTING = re.compile(r"\n\s*\d+ \| .*", re.DOTALL)


class Grammars:
    """What compiles grammars for one tokenizer. Its parts may be called from any thread.

    vocab_size: entries of the model's logits. eos_token_ids: the tokens that end a completion.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._source = tokenizer
        self._lock = threading.Lock()
        self.vocab_size = vocab_size
        self.eos = np.array(sorted(eos_token_ids), dtype=np.int64)

    @cached_property
    def _tokenizer(self) -> Any:
        """Made when first used: it takes a second for a large vocabulary."""
        adapter = require("serve", "llguidance.hf")
        size = max(self.vocab_size, len(self._source))
        return adapter.from_tokenizer(self._source, n_vocab=size, eos_token=int(self.eos[0]))

    def marks(self) -> Marks:
        """How a grammar for the tokenizer writes the tags."""
        with self._lock:
            tokenizer = self._tokenizer
        added = self._source.added_tokens_decoder.items()
        own = {token.content: i for i, token in added if not token.special and tokenizer.is_special_token(i)}
        written = [f"<[{own[tag]}]>" if tag in own else json.dumps(tag) for tag in (OPEN, CLOSE)]
        others = [str(token) for name, token in own.items() if name not in (OPEN, CLOSE)]
        return Marks(*written, f"<[{','.join(others)}]>" if others else None)

    def schema(self, schema: Mapping[str, Any], *, samples: int) -> Constraint:
        """JSON that validates against `schema`, for a request of so many samples. ConfigError: it cannot be."""
        return self._compile("grammar_from_json_schema", _json(schema), samples)

    def lark(self, grammar: str, *, samples: int) -> Constraint:
        """Text that a grammar in llguidance's Lark dialect accepts. ConfigError: it does not compile."""
        return self._compile("grammar_from_lark", grammar, samples)

    def _compile(self, form: str, source: str, samples: int) -> Constraint:
        guidance = require("serve", "llguidance")
        grammar = getattr(guidance.LLMatcher, form)(source)
        if len(grammar) > MAX_GRAMMAR:
            raise ConfigError(f"it has {len(grammar)} characters, at most {MAX_GRAMMAR} are taken")
        with self._lock:
            tokenizer = self._tokenizer
        limits = guidance.LLParserLimits(verbose_errors=False)
        matcher = guidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ConfigError(_why(matcher))
        constraint = Constraint(matcher, self.vocab_size, self.eos, samples)
        try:
            constraint([], [])
        except DataError as error:
            raise ConfigError(str(error)) from error
        return constraint


class Constraint:
    """The token mask of one request: bool [V], True for what the grammar allows next.

    An end-of-sequence token is allowed exactly where the grammar accepts what has been written. How far each sample has
    come is found by its tokens, not by the order of the calls, so that interleaved samples, preemption and recompute
    change nothing; the usual call goes one token on from where a matcher stands.
    """

    def __init__(self, matcher: Any, vocab_size: int, eos: np.ndarray, samples: int) -> None:
        self._fresh = matcher
        self._vocab_size = vocab_size
        self._eos = eos
        self._samples = samples
        self._matchers: list[tuple[Any, list[int]]] = []  # with the tokens each has consumed; the latest used last

    def __call__(self, prompt: list[int], generated: list[int]) -> np.ndarray:
        """The mask after `generated`. DataError: the grammar became too complex, or excludes what was generated."""
        matcher, consumed = self._nearest(generated)
        if not matcher.consume_tokens(generated[len(consumed) :]):
            raise DataError(_why(matcher))
        self._matchers.append((matcher, list(generated)))
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            raise DataError(_why(matcher))
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        allowed[self._eos] = matcher.is_accepting()
        return allowed

    def _nearest(self, generated: list[int]) -> tuple[Any, list[int]]:
        """The matcher that has consumed most of `generated` and nothing else, taken off the list; else a fresh one."""
        fitting = [pair for pair in self._matchers if generated[: len(pair[1])] == pair[1]]
        if fitting:
            best = max(fitting, key=lambda pair: len(pair[1]))
            self._matchers.remove(best)
            return best
        if len(self._matchers) >= self._samples:
            self._matchers.pop(0)
        return self._fresh.deep_copy(), []


@dataclass(frozen=True, slots=True)
class Marks:
    """How a grammar writes the tags: as text in quotes, or as the token of its own that a tokenizer has for a tag.

    visible: the other tokens that a grammar can only name by number though text shows them, such as `<think>`.
    """

    open: str
    close: str
    visible: str | None


Functions = Mapping[str, Mapping[str, Any]]
"""Names of functions with the JSON Schemas of their arguments."""


def calls_grammar(functions: Functions, marks: Marks, *, several: bool) -> str:
    """The Lark grammar of llguidance for a call, or for several."""
    start = 'start: call ("\\n" call)*' if several else "start: call"
    return "\n".join(["%llguidance {}", start, f"call: {marks.open} body", *_body_rules(functions, marks)])


def offered_grammar(functions: Functions, marks: Marks, *, several: bool) -> str:
    """The same where the model may call or not: any text, in which a tag is followed by nothing but a valid call."""
    lines = ["%llguidance {}", f"start: call{'*' if several else '?'} text"]
    lines.append("text: TEXT?" if marks.visible is None else f"text: TEXT? ({marks.visible} TEXT?)*")
    if marks.open.startswith("<["):
        lines.append(f"call: text {marks.open} body")
    else:
        before = "" if marks.visible is None else f"(TEXT? {marks.visible})* "
        lines += [f"call: {before}opened body", f"opened[lazy]: /(.|\\n)*{OPEN}/"]
    lines.append(f"TEXT: /(.|\\n)+/ & ~/(.|\\n)*{OPEN}(.|\\n)*/")
    return "\n".join([*lines, *_body_rules(functions, marks)])


def _body_rules(functions: Functions, marks: Marks) -> list[str]:
    names = [f"call_{i}" for i in range(len(functions))]
    rules = [f"body: {' | '.join(names)}"]
    for rule, (name, schema) in zip(names, functions.items(), strict=True):
        head = json.dumps("\n" + json.dumps({"name": name})[:-1] + ', "arguments": ')
        rules.append(f'{rule}: {head} %json {_json(schema)} "}}\\n" {marks.close}')
    return rules


def _json(schema: Mapping[str, Any]) -> str:
    """The schema as the library takes it, which accepts exactly the documents that the schema does."""
    try:
        return json.dumps({**schema, "x-guidance": {**_STYLE, **_STRICT}}, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the schema is not JSON: {error}") from error


def _why(matcher: Any) -> str:
    """The library's message in one line, without the listing of the grammar that follows it."""
    text = " ".join(_LISTING.sub("", matcher.get_error()).split()).removesuffix("<non-verbose/>").rstrip()
    if text in _NOTHING_FOLLOWS:
        return "nothing satisfies it"
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + " ..."


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
