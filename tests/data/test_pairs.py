"""Source and target texts as token lists, for one vocabulary and for two."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tiny_model import CHATML
from tiny_seq2seq import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from upslope.data.chat import encode_completion, encode_conversation, encode_document, encode_prompt, load_tokenizer
from upslope.data.examples import examples_of
from upslope.data.pieces import SOURCE_FOLDER, PairTokenizer
from upslope.data.records import record_of
from upslope.engine.outputs import TextStream
from upslope.errors import DataError, ModelError
from upslope.models.files.loading import save_model
from upslope.preview.dry_run import mask_view
from upslope.types import Message, Prompt

PAD, EOS = 0, 1


def byte_tokenizer(extra: int = 0, **options: str) -> PreTrainedTokenizerFast:
    """<pad>, </s>, `extra` unused tokens, then one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "</s>", *(f"<{i}>" for i in range(extra)), *alphabet]
    inner = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{"eos_token": "</s>", "pad_token": "<pad>", **options})


def shared() -> PairTokenizer:
    return PairTokenizer(byte_tokenizer(), decoder_start_token_id=PAD)


def separate() -> PairTokenizer:
    return PairTokenizer(byte_tokenizer(), byte_tokenizer(9), decoder_start_token_id=PAD, source_offset=300)


@given(source=st.text(min_size=1, max_size=30), target=st.text(max_size=30))
@pytest.mark.parametrize("kind", [shared, separate])
def test_pairs_round_trip(kind: type, source: str, target: str) -> None:
    pair = kind()
    if "<" in source + target:  # what looks like a special token is one
        return
    source, target = (x.encode(errors="replace").decode() for x in (source, target))
    example = encode_completion(pair, source, target)
    start = example.tokens.index(PAD)
    assert example.tokens[: start + 1] == encode_prompt(pair, Prompt(key=0, text=source))
    assert example.tokens[start - 1] == pair.source_offset + EOS
    assert example.tokens[-1] == EOS
    assert example.mask == [False] * (start + 1) + [True] * (len(example.tokens) - start - 1)
    assert pair.decode(example.tokens[:start], skip_special_tokens=True) == source
    assert pair.decode(example.tokens[start:], skip_special_tokens=True) == target
    assert pair.decode(example.tokens, skip_special_tokens=True) == source + target
    if pair.source_offset:
        assert min(example.tokens[:start]) >= pair.source_offset
        assert max(example.tokens[start:]) < pair.source_offset


def test_ends_are_not_doubled_and_lengths_are_checked() -> None:
    pair = shared()
    assert pair.source_ids("ab</s>") == pair.source_ids("ab")
    assert pair.target_ids("ab</s>") == pair.target_ids("ab")
    assert len(encode_completion(pair, "abc", "de", max_length=8).tokens) == 8
    with pytest.raises(DataError, match="8 tokens are more than max_length 7"):
        encode_completion(pair, "abc", "de", max_length=7)
    assert (pair.eos_token_id, pair.pad_token_id, pair.bos_token_id, len(pair)) == (EOS, PAD, None, 258)
    assert pair.chat_template is None


def test_records_streams_and_previews_take_a_pair() -> None:
    pair = separate()
    rows = [{"prompt": "ab", "completion": "cde"}, {"prompt": "f" * 40, "completion": "g"}]
    encoded = examples_of([record_of(row, f"row {i}") for i, row in enumerate(rows)], pair, max_length=20)
    assert [len(e.tokens) for e in encoded.examples] == [8]
    assert encoded.too_long == [(1, 44)]
    assert str(mask_view(encoded.examples[0], pair)) == "a·b·</s>·<pad>⟦c·d·e·</s>⟧"
    stream = TextStream(pair)
    stream.push(pair.target_ids("héllo"), final=True)
    assert stream.text == "héllo"
    assert pair.convert_ids_to_tokens(301) == "</s>"


def test_a_folder_of_one_vocabulary_and_of_two(tmp_path: Path) -> None:
    save_model(tiny("post", vocab_size=258), tmp_path / "one", tokenizer=shared())
    save_model(tiny("separate", vocab_size=300, source_vocab_size=267), tmp_path / "two", tokenizer=separate())
    for folder, pair in (("one", shared()), ("two", separate())):
        loaded = load_tokenizer(tmp_path / folder)
        assert isinstance(loaded, PairTokenizer)
        assert loaded.source_ids("a b é") == pair.source_ids("a b é")
        assert loaded.target_ids("a b é") == pair.target_ids("a b é")
        assert (tmp_path / folder / SOURCE_FOLDER).is_dir() == (folder == "two")
        model = tiny("separate", vocab_size=300, source_vocab_size=267) if folder == "two" else tiny(vocab_size=258)
        save_model(model, tmp_path / "again", source_folder=tmp_path / folder, overwrite=True)
        assert load_tokenizer(tmp_path / "again").source_ids("xyz") == pair.source_ids("xyz")


def test_folders_whose_parts_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_model(tiny("separate", vocab_size=300, source_vocab_size=267), folder, tokenizer=separate())
    path = folder / "config.json"
    good = json.loads(path.read_text())

    def attempt(words: str, **changes: object) -> None:
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(ModelError, match=words):
            load_tokenizer(folder)

    attempt("calls for none", share_encoder_decoder_embeddings=True)
    attempt("no decoder_start_token_id", decoder_start_token_id=None)
    attempt("source tokenizer has 267 tokens but the model embeds only 200", vocab_size=200)
    attempt("target tokenizer has 258 tokens but the model embeds only 100", decoder_vocab_size=100)
    attempt("is also the source's EOS", decoder_vocab_size=300, decoder_start_token_id=301)
    path.write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        load_tokenizer(folder)
    path.write_text(json.dumps(good))
    (folder / SOURCE_FOLDER / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"source_tokenizer: no tokenizer"):
        load_tokenizer(folder)


def test_what_a_pair_refuses() -> None:
    pair, chat = shared(), [Message("user", "a"), Message("assistant", "b")]
    with pytest.raises(DataError, match=r"prompt 7: an encoder-decoder takes a text as prompt"):
        encode_prompt(pair, Prompt(key=7, messages=chat[:1]))
    with pytest.raises(DataError, match="not messages"):
        encode_conversation(pair, chat)
    with pytest.raises(DataError, match="not messages"):
        encode_completion(pair, chat[:1], chat[1:])
    with pytest.raises(DataError, match="learns from pairs"):
        encode_document(pair, "abc")
    with pytest.raises(DataError, match="prompt 1: the source text has no tokens"):
        encode_prompt(pair, Prompt(key=1, text=""))
    with pytest.raises(DataError, match="marks the beginning of the target"):
        encode_completion(pair, "a<pad>b", "c")
    assert separate().source_ids("a<pad>b").count(PAD) == 1, "another vocabulary's pad is no decoder_start"


def test_tokenizers_that_make_no_pair() -> None:
    with pytest.raises(ModelError, match="give EOS a token of its own"):
        PairTokenizer(byte_tokenizer(), decoder_start_token_id=EOS)
    with pytest.raises(ModelError, match="goes with a source_offset"):
        PairTokenizer(byte_tokenizer(), byte_tokenizer(), decoder_start_token_id=PAD)
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(ModelError, match="target tokenizer has no EOS"):
        PairTokenizer(endless, decoder_start_token_id=PAD)


def test_a_template_in_the_target_is_not_used() -> None:
    pair = PairTokenizer(byte_tokenizer(chat_template=CHATML), decoder_start_token_id=PAD)
    assert pair.chat_template is None
