"""Tiny random encoders of several families with tokenizers built here, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaTokenizer

from upslope.models.encoder.network import Encoder, Kind, new_encoder

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["good", "bad", "film", "the", "was", "in", "visit", "saw", "and", "we"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def bert_tokenizer(*, last: bool = False) -> PreTrainedTokenizerFast:
    """WordPiece with a few whole words; other words fall into letters. `last`: the class token ends it (XLNet)."""
    pieces = [*SPECIAL, *LETTERS, *(f"##{x}" for x in LETTERS), *WORDS]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    if last:
        single, pair = "$A [SEP] [CLS]", "$A [SEP] $B [SEP] [CLS]"
    inner.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        padding_side="left" if last else "right",
    )


def roberta_tokenizer() -> RobertaTokenizer:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet]
    return RobertaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])


def tokenizer_for(model_type: str) -> Any:
    """The tokenizer of a family."""
    return roberta_tokenizer() if model_type == "roberta" else bert_tokenizer(last=model_type == "xlnet")


def tiny_encoder(kind: Kind, model_type: str = "bert", *, seed: int = 0, width: int = 32, **more: Any) -> Encoder:
    """Two layers, 64 positions."""
    tokenizer = tokenizer_for(model_type)
    return new_encoder(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_layers=2,
        num_heads=2,
        intermediate_size=2 * width,
        max_positions=64,
        model_type=model_type,
        pad_token_id=tokenizer.pad_token_id,
        seed=seed,
        initializer_range=0.2,
        **more,
    )


def encoder_folder(path: Path, model_type: str = "bert", **more: Any) -> Path:
    """A pretrained-looking folder: a trunk with a head on masked words (XLNet: on classes x and y)."""
    if model_type == "xlnet":
        encoder = tiny_encoder("classify", model_type, labels=["x", "y"], **more)
    else:
        encoder = tiny_encoder("masked", model_type, **more)
    return encoder.save(path, tokenizer=tokenizer_for(model_type))
