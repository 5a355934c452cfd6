"""Training a tokenizer on texts: byte-level BPE, whole words, or characters.

bpe   merges of bytes (Sennrich et al. 2016, arXiv 1508.07909, over the bytes of GPT-2). Every text comes back exactly.
word  words, punctuation and white space as they stand; what is not among the `vocab_size` most frequent is [UNK].
char  characters; one that the training texts did not show is spelled in its UTF-8 bytes. Every text comes back exactly.

The same texts in the same order give the same tokenizer.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Literal, get_args

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from upslope.data.pieces import FastTokenizer
from upslope.errors import ConfigError, DataError

TokenizerKind = Literal["bpe", "word", "char"]
KINDS: tuple[TokenizerKind, ...] = get_args(TokenizerKind)

EOS, UNKNOWN = "<|endoftext|>", "[UNK]"
CAUSAL_SPECIALS = (EOS,)
"""Ends a text, and pads."""
MASKED_SPECIALS = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")
"""BERT's: a text is framed as [CLS] text [SEP]."""

_ROLES = {
    EOS: "eos_token",
    "</s>": "eos_token",
    "<s>": "bos_token",
    "[PAD]": "pad_token",
    "<pad>": "pad_token",
    UNKNOWN: "unk_token",
    "[CLS]": "cls_token",
    "[SEP]": "sep_token",
    "[MASK]": "mask_token",
}
_WORD_MARK = "\u2581"  # stands for the space before a word, as in SentencePiece
_WORDS = rf"{_WORD_MARK}?\w+|{_WORD_MARK}?[^\w\s{_WORD_MARK}]|{_WORD_MARK}+|\s+"
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def train_tokenizer(
    texts: Iterable[str], kind: TokenizerKind, vocab_size: int, *, special_tokens: Sequence[str] = CAUSAL_SPECIALS
) -> FastTokenizer:
    """Train a tokenizer of at most `vocab_size` tokens, special ones included; `save_pretrained` writes it.

    `texts` is read once and not kept. Special tokens get the ids from 0 on, in their order (`word` adds [UNK]); names
    that are usual for a role get it: <|endoftext|> or </s> ends a text, [PAD] or <pad> pads (where neither is there,
    the token that ends does), <s>, [UNK], [CLS], [SEP], [MASK]. With [CLS] and [SEP] a text is framed by them when
    special tokens are asked for. bpe and char need room for 256 bytes besides the special tokens.

    Raises ConfigError for an unknown kind or a vocabulary too small, DataError when the texts are empty.
    """
    if kind not in KINDS:
        raise ConfigError(f"tokenizer {kind!r} is unknown: {', '.join(KINDS)}")
    specials = list(dict.fromkeys([*special_tokens, *[UNKNOWN] * (kind == "word")]))
    least = len(specials) + (1 if kind == "word" else 256)
    if vocab_size < least:
        needed = "one word" if kind == "word" else "256 bytes"
        raise ConfigError(
            f"vocab_size is {vocab_size}; a {kind} tokenizer needs at least {least}: "
            f"{len(specials)} special tokens and {needed}"
        )
    counted = _Counted(texts)
    inner = {"bpe": _bpe, "word": _word, "char": _char}[kind](counted, vocab_size, specials)
    if not counted.characters:
        raise DataError("no text to train a tokenizer on: every text is empty")
    inner.add_special_tokens(specials)
    if {"[CLS]", "[SEP]"} <= set(specials):
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, inner.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
        )
    return _wrapped(inner, specials)


class _Counted:
    """An iterable of texts that knows how many characters went through."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.characters = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.characters += len(text)
            yield text


def _bpe(texts: Iterable[str], vocab_size: int, specials: list[str]) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return inner


def _word(texts: Iterable[str], vocab_size: int, specials: list[str]) -> Tokenizer:
    inner = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=_WORD_MARK, prepend_scheme="first", split=False),
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
        ]
    )
    inner.decoder = decoders.Metaspace(replacement=_WORD_MARK, prepend_scheme="first")
    inner.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    )
    return inner


def _char(texts: Iterable[str], vocab_size: int, specials: list[str]) -> Tokenizer:
    counts = Counter(chain.from_iterable(texts))
    room = vocab_size - len(specials) - len(_BYTES)
    frequent = sorted(counts, key=lambda character: (-counts[character], character))[:room]
    tokens = [*specials, *_BYTES, *sorted(frequent)]
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return inner


def _wrapped(inner: Tokenizer, specials: Sequence[str]) -> FastTokenizer:
    from transformers import PreTrainedTokenizerFast

    roles: dict[str, str] = {}
    for name in specials:
        if name in _ROLES:
            roles.setdefault(_ROLES[name], name)
    if "eos_token" in roles:
        roles.setdefault("pad_token", roles["eos_token"])
    further = [name for name in specials if name not in roles.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        clean_up_tokenization_spaces=False,
        **roles,
        **({"additional_special_tokens": further} if further else {}),
    )
