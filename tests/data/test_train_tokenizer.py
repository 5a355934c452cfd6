"""Tokenizers trained on texts: exact round trips, sizes, roles, determinism, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.data.chat import encode_text, load_tokenizer
from upslope.data.train_tokenizer import CAUSAL_SPECIALS, KINDS, MASKED_SPECIALS, train_tokenizer
from upslope.errors import ConfigError, DataError

TEXTS = [
    "The cat sat on the mat.\nThe dog, too, sat there!\n",
    "A cat and a dog: 12 cats, 3 dogs.",
    "naïve café — 你好世界\n\n  two spaces",
]
BPE, WORD, CHAR = (train_tokenizer(TEXTS, kind, 340) for kind in KINDS)


def ids(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_bpe_and_char_give_every_text_back(text: str) -> None:
    for tokenizer in (BPE, CHAR):
        if not any(name in text for name in tokenizer.all_special_tokens):
            assert tokenizer.decode(ids(tokenizer, text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_training_texts_come_back_from_the_saved_folder(kind: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, kind, 400)
    tokenizer.save_pretrained(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert ids(loaded, text) == ids(tokenizer, text)
        assert loaded.decode(ids(loaded, text)) == text
        assert encode_text(loaded, text) == ids(loaded, text)
    assert loaded.eos_token == loaded.pad_token == "<|endoftext|>"
    assert loaded.eos_token_id == 0
    assert len(loaded) <= 400
    assert ids(loaded, "a<|endoftext|>b")[1] == 0


def test_words_that_were_not_seen_are_unknown() -> None:
    unknown = WORD.convert_tokens_to_ids("[UNK]")
    assert WORD.unk_token_id == unknown
    assert unknown not in ids(WORD, "The cat sat there!")
    assert [i == unknown for i in ids(WORD, "The zebra sat")] == [False, True, False]
    assert len(ids(WORD, "The cat sat.")) == 4


def test_a_word_vocabulary_keeps_the_most_frequent() -> None:
    tokenizer = train_tokenizer(["b b b a a c"], "word", 4)
    assert len(tokenizer) == 4
    assert tokenizer.unk_token_id not in ids(tokenizer, "x b a")[1:]
    assert ids(tokenizer, "a c")[1] == tokenizer.unk_token_id


def test_a_char_vocabulary_keeps_the_most_frequent_and_spells_the_rest() -> None:
    tokenizer = train_tokenizer(["zzzyyx"], "char", 1 + 256 + 2)
    assert len(ids(tokenizer, "zyx")) == 3
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, "zyxé")) == ["z", "y", "<0x78>", "<0xC3>", "<0xA9>"]


def test_masked_special_tokens_have_their_roles_and_frame_a_text() -> None:
    for kind in KINDS:
        tokenizer = train_tokenizer(TEXTS, kind, 400, special_tokens=MASKED_SPECIALS)
        assert tokenizer.convert_tokens_to_ids(list(MASKED_SPECIALS)) == [0, 1, 2, 3, 4]
        roles = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token)
        assert (*roles, tokenizer.mask_token) == MASKED_SPECIALS
        framed = tokenizer("The cat")["input_ids"]
        assert framed == [2, *ids(tokenizer, "The cat"), 3]
        assert tokenizer.decode(framed, skip_special_tokens=True) == "The cat"


def test_further_special_tokens_are_kept_whole() -> None:
    tokenizer = train_tokenizer(TEXTS, "bpe", 300, special_tokens=("<pad>", "</s>", "<s>", "<2de>"))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert ids(tokenizer, "<2de>")[0] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_give_the_same_tokenizer(kind: str) -> None:
    first, second = (train_tokenizer(iter(TEXTS * 3), kind, 300) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_merges_are_learned() -> None:
    assert len(ids(train_tokenizer(["abcabcabc " * 50], "bpe", 270), "abcabc")) < 6


@pytest.mark.parametrize(("kind", "size"), [("bpe", 256), ("char", 256), ("word", 2), ("bpe", 0)])
def test_a_vocabulary_too_small_is_refused(kind: str, size: int) -> None:
    with pytest.raises(ConfigError, match=f"vocab_size is {size}; a {kind} tokenizer needs at least"):
        train_tokenizer(TEXTS, kind, size)


def test_other_bad_input() -> None:
    with pytest.raises(ConfigError, match="'sentence' is unknown: bpe, word, char"):
        train_tokenizer(TEXTS, "sentence", 300)  # type: ignore[arg-type]
    for kind in KINDS:
        with pytest.raises(DataError, match="no text"):
            train_tokenizer(["", ""], kind, 300, special_tokens=CAUSAL_SPECIALS)


def test_an_error_in_the_texts_comes_through() -> None:
    def texts():
        yield "fine"
        raise DataError("x.txt:3: not UTF-8")

    for kind in KINDS:
        with pytest.raises(DataError, match=r"x\.txt:3"):
            train_tokenizer(texts(), kind, 300)
