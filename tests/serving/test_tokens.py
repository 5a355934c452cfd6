"""Tokens and text, and the way back."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from gguf_kit import byte_level, decoder_folder, sentencepiece
from tiny_model import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from upslope.data.chat import encode_prompt, load_tokenizer
from upslope.options import ServeOptions
from upslope.serving.server import create_app
from upslope.serving.vocabulary import Offsets, Pieces
from upslope.types import Message, Prompt

from .conftest import NAME, make_service

TEXTS = ["abc", "é 你好 \U0001f600!", "<|im_start|>user\nhi<|im_end|>", " a  b\n\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_there_and_back(client: TestClient, text: str) -> None:
    there = client.post("/tokenize", json={"prompt": text, "model": NAME, "return_token_strs": True}).json()
    assert there["tokens"] == tiny_tokenizer()(text)["input_ids"]
    assert (there["count"], there["max_model_len"]) == (len(there["tokens"]), 512)
    assert len(there["token_strs"]) == there["count"]
    back = client.post("/detokenize", json={"tokens": there["tokens"]})
    assert back.json()["prompt"] == text
    assert back.headers["X-Weight-Version"] == "0"


def test_a_conversation(client: TestClient) -> None:
    """As the chat template writes it, with or without the beginning of the reply."""
    turns = [{"role": "user", "content": "hi"}]
    whole = "<|im_start|>user\nhi<|im_end|>\n"
    for fields, text in (
        ({}, whole + "<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, whole),
    ):
        found = client.post("/tokenize", json={"messages": turns, **fields}).json()
        assert found["tokens"] == tiny_tokenizer()(text)["input_ids"]
    going_on = [*turns, {"role": "assistant", "content": "ho"}]
    found = client.post("/tokenize", json={"messages": going_on, "continue_final_message": True}).json()
    assert found["tokens"] == tiny_tokenizer()(whole + "<|im_start|>assistant\nho")["input_ids"]


def test_nothing_is_text_too(client: TestClient) -> None:
    assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert client.post("/detokenize", json={"tokens": []}).json()["prompt"] == ""


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "with EOS behind a text"])
def test_a_text_has_the_tokens_that_training_gives_it(tmp_path: Path, kind: str) -> None:
    """One BOS where the tokenizer adds one, whether the text has it or not; never the EOS that it adds too."""
    tokenizer = sentencepiece() if kind == "sentencepiece" else byte_level(bos=True)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if kind == "with EOS behind a text":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A {eos}", special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (bos, eos)]
        )
    app = create_app({NAME: make_service(decoder_folder(tmp_path / "m", tokenizer))}, ServeOptions())
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for text in ("the 12", f"{bos}the 12", "", " a", f"{bos}"):
            trained = encode_prompt(tokenizer, Prompt(0, text=text))
            assert trained.count(tokenizer.bos_token_id) == 1
            assert client.post("/tokenize", json={"prompt": text}).json()["tokens"] == trained
            asked = {"prompt": text, "max_tokens": 1, "return_token_ids": True}
            answer = client.post("/v1/completions", json=asked).json()
            assert answer["choices"][0]["prompt_token_ids"] == trained
            assert answer["usage"]["prompt_tokens"] == len(trained)
            vector, wanted = (
                client.post("/v1/embeddings", json={"input": given}).json()["data"][0]["embedding"]
                for given in (text, trained)
            )
            assert vector == wanted
            bare = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
            assert bare == tokenizer(text, add_special_tokens=False).input_ids
        turns = [{"role": "user", "content": "hi"}]
        trained = encode_prompt(tokenizer, Prompt(0, messages=(Message("user", "hi"),)))
        assert client.post("/tokenize", json={"messages": turns}).json()["tokens"] == trained


def test_what_is_refused(client: TestClient) -> None:
    for path, body in (
        ("/tokenize", {"prompt": ["a"]}),
        ("/tokenize", {"prompt": "a", "other": 1}),
        ("/tokenize", {}),
        ("/tokenize", []),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "hi"}]}),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": False}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"messages": [{"role": "user", "content": "hi"}], "continue_final_message": True}),
        ("/detokenize", {"tokens": [258]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "a"}),
    ):
        assert client.post(path, json=body).status_code == 400, (path, body)
    found = client.post("/tokenize", json={"prompt": "a", "tools": []}).json()["error"]
    assert found["message"] == "tools: this field is not supported; leave it out"
    assert client.post("/tokenize", json={"prompt": "a", "model": "other"}).status_code == 404
    assert client.get("/tokenizer_info", params={"model": "other"}).status_code == 404


def test_tokenizer_info(client: TestClient) -> None:
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    assert "im_start" in info["chat_template"]
    assert info["model_max_length"] == 512


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_the_bundled_tokenizer_are_the_texts_bytes(smollm2_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(smollm2_folder)
    pieces = Pieces(tokenizer)
    tokens = tokenizer(text)["input_ids"]
    assert b"".join(map(pieces.raw, tokens)) == text.encode("utf-8")
    places = Offsets(pieces).push(tokens, prompt=text)
    for token, place in zip(tokens, places, strict=True):
        if not pieces.text(token).startswith("bytes:"):
            assert text[place:].startswith(pieces.text(token))


def test_texts_of_tokens_differ_where_their_bytes_do() -> None:
    pieces = Pieces(tiny_tokenizer())
    names = [pieces.text(token) for token in range(258)]
    assert len(set(names)) == 258
    assert pieces.text(1000) == "", "an id that the tokenizer has no name for"
    assert pieces.by_text({5: -1.0, 6: -2.0}) == {pieces.text(5): -1.0, pieces.text(6): -2.0}
    assert pieces.by_text({1001: -2.0, 1000: -1.0, 1002: -3.0}) == {"": -1.0}, "the likelier one stays"


def test_offsets_of_random_bytes() -> None:
    """Each offset is the number of characters that were complete before the token."""
    pieces, draw = Pieces(tiny_tokenizer()), random.Random(0)
    for _ in range(50):
        text = "".join(draw.choice("ab é你\U0001f600") for _ in range(12))
        tokens = tiny_tokenizer()(text)["input_ids"]
        raw = text.encode("utf-8")
        wanted = [len(raw[:i].decode("utf-8", errors="ignore")) for i in range(len(raw))]
        assert Offsets(pieces).push(tokens) == wanted
