"""Perplexity against a loop over the definition with transformers' float64 logits; documents and their counts."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from gguf_kit import byte_level, decoder_folder
from tiny_model import tiny_folder
from transformers import AutoModelForCausalLM

from upslope.build import load_inference
from upslope.errors import DataError, UpslopeError
from upslope.evaluation.measurement import Measurement
from upslope.evaluation.perplexity import count_words, perplexity, read_documents
from upslope.evaluation.scorer import Scorer

WIKITEXT = (
    " \n = Robert <unk> = \n \n He had a guest @-@ starring role . \n \n = = Career = = \n \n In 2000 <unk> . \n \n"
    " = 1 = 2 = \n \n Second one . \n x = y = z \n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("perplexity") / "m", max_position_embeddings=64)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    policy = load_inference(folder, dtype="float32")
    return Scorer(policy.model, policy.tokenizer)


def values(found: list[Measurement]) -> dict[str, float]:
    return {m.name: m.figure(resamples=20).value for m in found}


@pytest.mark.parametrize(("context", "stride"), [(64, 64), (16, 16), (16, 5)])
def test_perplexity_is_the_definition(folder: Path, scorer: Scorer, tmp_path: Path, context: int, stride: int) -> None:
    texts = ["Ein Haus, größer als zwei.", "the end of a long day \n over <unk> @-@ land", "x"]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"text": {text!r}}}\n'.replace("'", '"') for text in texts))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    total, tokens = 0.0, 0
    for text in texts:
        ids = scorer.tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = [scorer.prefix, *ids]
        end = 0
        while end < len(ids):  # one window after the other
            first, end = end, min(len(ids), end + (stride if end else context))
            read = whole[max(0, end - context) : end]
            with torch.no_grad():
                logp = model(torch.tensor([read])).logits[0].log_softmax(-1)
            for t in range(first, end):
                total += float(logp[len(read) - (end - t), ids[t]])
        tokens += len(ids)
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    found = values(perplexity(scorer, read_documents(str(path)), context=context, stride=stride))
    assert found["token_perplexity"] == pytest.approx(math.exp(-total / tokens), rel=1e-5)
    assert found["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert found["byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-5)


def test_a_text_with_its_own_bos_is_not_read_behind_two(tmp_path: Path) -> None:
    policy = load_inference(decoder_folder(tmp_path / "m", byte_level(bos=True)), dtype="float32")
    found = []
    for text in ("the end", f"{policy.tokenizer.bos_token}the end"):
        (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}) + "\n")
        documents = read_documents(str(tmp_path / "t.jsonl"))
        measured = perplexity(Scorer(policy.model, policy.tokenizer), documents, context=16, stride=16)
        found.append((values(measured)["token_perplexity"], measured[0].detail["tokens"]))
    assert found[0] == found[1]


def test_counts_and_intervals_are_of_documents(scorer: Scorer, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "one two"}\n{"text": "drei  vier fünf"}\n')
    (figure, *_) = (m.figure(resamples=20) for m in perplexity(scorer, read_documents(str(path)), context=8, stride=8))
    assert figure.n == 2
    assert figure.detail["interval"] == "bootstrap over 2 documents (rows), 20 resamples"
    assert (figure.detail["tokens"], figure.detail["words"], figure.detail["bytes"]) == (23, 5, 23)
    assert figure.better == "lower"


def test_one_document_is_resampled_in_blocks_that_add_up(scorer: Scorer, tmp_path: Path) -> None:
    text = "\n".join(f"line {i} ö with   words" for i in range(40)) + "\n"
    whole, other = tmp_path / "whole.txt", tmp_path / "two.jsonl"
    whole.write_text(text)
    blocks = perplexity(scorer, read_documents(str(whole)), context=32, stride=16)
    rows = blocks[0].statistics_NK
    assert len(rows) >= 20
    assert rows[:, 1:].sum(axis=0).tolist() == [len(text.encode()), len(re.split(r"\s+", text)), len(text.encode())]
    ids = scorer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert rows[:, 0].sum() == pytest.approx(math.fsum(scorer.rolling([ids], context=32, stride=16)[0]))
    assert len(set(rows[:-1, 1])) == 1  # all but the last are equally long
    figure = blocks[0].figure(resamples=30)
    assert "blocks of one document" in figure.detail["interval"]
    assert figure.low < figure.value < figure.high
    other.write_text('{"text": "a"}\n')
    assert perplexity(scorer, read_documents(str(other)), context=4, stride=4)[0].n == 1


def test_words_are_counted_as_lm_eval_does() -> None:
    assert count_words("a b  c") == 3
    assert count_words(" = T = \n") == len(re.split(r"\s+", " = T = \n")) == 5


def test_wikitext_is_split_at_its_titles(tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.tokens"
    path.write_text(WIKITEXT)
    found = read_documents(str(path))
    assert found.form == "WikiText articles"
    assert [d.text.split(" = ")[1] for d in found.texts] == ["Robert <unk>", "1"]
    assert "".join(d.text for d in found.texts) == WIKITEXT.removeprefix(" \n")
    assert "guest @-@ starring" in found.texts[0].text
    assert found.texts[1].where == f"{path}:10"
    assert len(read_documents(str(path), limit=1).texts) == 1


def test_penn_treebank_is_one_sentence_a_line(tmp_path: Path) -> None:
    path = tmp_path / "ptb.test.txt"
    path.write_text(" no it was n't black monday \n\n but while <unk> \n")
    found = read_documents(str(path))
    assert found.form == "lines"
    assert [(d.text, d.where) for d in found.texts] == [
        ("no it was n't black monday", f"{path}:1"),
        ("but while <unk>", f"{path}:3"),
    ]
    assert read_documents(f"file:{path}").texts[0].text.startswith(" no it")


@pytest.mark.parametrize(
    ("name", "content", "form", "message"),
    [
        ("a.txt", b"", "", "the file is empty"),
        ("a.txt", b"ok\n\xff\xfe", "", ":2: not UTF-8"),
        ("a.txt", b"no title here\n", "wikitext", "no line is a WikiText title"),
        ("a.jsonl", b'{"prompt": "x"}\n', "", r":1: perplexity needs a row with the key 'text'"),
        ("a.jsonl", b'{"text": ""}\n', "", r":1: 'text' is empty"),
        ("a.jsonl", b'{"text": 3}\n', "", r":1: 'text' must be a text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "", r":2: invalid JSON"),
        ("a.jsonl", b'{"text": "a"}\n', "line", "leave 'line' out"),
        ("a.txt.gz", b"not gzip", "", "gzip file is damaged"),
    ],
)
def test_rubbish_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, form: str, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UpslopeError, match=message) as caught:
        read_documents(f"{form}:{tmp_path / name}" if form else str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        read_documents(str(tmp_path / "nowhere.txt"))


def test_a_word_perplexity_beyond_floats_is_infinite(scorer: Scorer, tmp_path: Path) -> None:
    path = tmp_path / "zh.txt"
    path.write_text("天气" * 100)  # one word of 600 bytes, each about ln 258 nats
    measured = perplexity(scorer, read_documents(str(path)), context=64, stride=64)
    found = {m.name: m.figure(resamples=5) for m in measured}
    assert found["word_perplexity"].value == math.inf
    assert found["word_perplexity"].as_json()["value"] is None
    assert 100 < found["byte_perplexity"].value < 600
