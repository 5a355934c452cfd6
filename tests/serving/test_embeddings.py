"""/v1/embeddings: the mean of the last hidden states, of length 1, in every form that clients ask for."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from tiny_model import tiny_folder

from upslope.models.attention.context import PackedContext
from upslope.serving.routes import BATCH_TOKENS, batches, shortened
from upslope.serving.service import Service

from .conftest import NAME

URL = "/v1/embeddings"


def service_of(app: FastAPI) -> Service:
    return app.state.services[NAME]


def embed(client: TestClient, given: Any, **body: Any) -> np.ndarray:
    response = client.post(URL, json={"input": given, **body})
    assert response.status_code == 200, response.text
    return np.array([row["embedding"] for row in response.json()["data"]])


def oracle(service: Service, tokens: list[int]) -> np.ndarray:
    """One prompt alone, in float64 from its hidden states on."""
    model = service.engine.model
    with torch.inference_mode():
        hidden = model(torch.tensor(tokens), PackedContext([len(tokens)])).double()
    mean = hidden.mean(0)
    return (mean / mean.norm()).numpy()


def test_the_answer(app: FastAPI, client: TestClient) -> None:
    service = service_of(app)
    texts = ["hello", "hello world", "é"]
    response = client.post(URL, json={"input": texts, "model": NAME})
    answer = response.json()
    assert (answer["object"], answer["model"]) == ("list", NAME)
    assert [(row["object"], row["index"]) for row in answer["data"]] == [("embedding", i) for i in range(3)]
    counted = sum(len(text.encode()) for text in texts)
    assert answer["usage"] == {"prompt_tokens": counted, "total_tokens": counted}
    assert answer["system_fingerprint"] == f"{NAME}@0"
    assert response.headers["x-weight-version"] == "0"
    for row, text in zip(answer["data"], texts, strict=True):
        expected = oracle(service, service.tokenizer(text)["input_ids"])
        assert row["embedding"] == pytest.approx(expected.tolist(), abs=1e-6)
        assert np.linalg.norm(row["embedding"]) == pytest.approx(1.0, abs=1e-6)


def test_an_input_depends_on_nothing_else(client: TestClient) -> None:
    """Bit for bit the same alone, in any company, as text or as tokens."""
    texts = [f"text number {i} " * (i % 7 + 1) for i in range(40)]
    together = embed(client, texts)
    assert sum(len(text) for text in texts) > BATCH_TOKENS
    for i in (0, 5, 39):
        assert (embed(client, texts[i])[0] == together[i]).all()
        tokens = client.post("/tokenize", json={"prompt": texts[i]}).json()["tokens"]
        assert (embed(client, tokens)[0] == together[i]).all()
        assert (embed(client, [tokens, tokens])[1] == together[i]).all()


def test_base64(client: TestClient) -> None:
    """Little-endian float32, the same numbers."""
    row = client.post(URL, json={"input": "abc", "encoding_format": "base64"}).json()["data"][0]
    decoded = np.frombuffer(base64.b64decode(row["embedding"]), dtype="<f4")
    assert (decoded == embed(client, "abc")[0].astype(np.float32)).all()


def test_fewer_dimensions(app: FastAPI, client: TestClient) -> None:
    full = embed(client, "abc")[0]
    short = embed(client, "abc", dimensions=5)[0]
    assert short == pytest.approx(full[:5] / np.linalg.norm(full[:5]), abs=1e-6)
    width = service_of(app).engine.model.spec.hidden_size
    assert embed(client, "abc", dimensions=width)[0] == pytest.approx(full, abs=1e-6)


def test_shortened_by_hand() -> None:
    given = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 1.0]])
    assert shortened(given, 2).tolist() == [[0.6, 0.8], [0.0, 0.0]]


def test_batches() -> None:
    prompts = [[1] * n for n in (3, 3, 9, 1, 2, 2)]
    assert [[len(p) for p in batch] for batch in batches(prompts, 6)] == [[3, 3], [9], [1, 2, 2]]
    assert [len(batch) for batch in batches([[1] * 9], 6)] == [1]


def test_weights_that_change_meanwhile(
    app: FastAPI, client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All vectors of an answer come from the same weights, the newer ones."""
    service = service_of(app)
    texts = ["a" * 500] * 9
    old = embed(client, texts)
    folder = str(tiny_folder(tmp_path / "other", seed=1))
    call, calls = service.call, []

    async def swapping(function: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            await service.swap(folder)
        return await call(function)

    monkeypatch.setattr(service, "call", swapping)
    response = client.post(URL, json={"input": texts})
    vectors = np.array([row["embedding"] for row in response.json()["data"]])
    assert response.json()["system_fingerprint"] == f"{NAME}@1"
    assert (vectors == vectors[0]).all()
    assert not np.allclose(vectors, old)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "input"),
    ({"input": []}, "empty list"),
    ({"input": ""}, "no tokens"),
    ({"input": ["a", ""]}, "input 1"),
    ({"input": [[]]}, "no tokens"),
    ({"input": "a" * 513}, "513 tokens"),
    ({"input": [258]}, "258"),
    ({"input": [-1]}, "input"),
    ({"input": [1.5]}, "input"),
    ({"input": [["a"]]}, "input"),
    ({"input": {"text": "a"}}, "input"),
    ({"input": "a", "dimensions": 0}, "dimensions"),
    ({"input": "a", "dimensions": 33}, "dimensions"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ({"input": "a", "task": "query"}, "task"),
]


@pytest.mark.parametrize(("body", "named"), WRONG, ids=[f"{i}-{named}" for i, (_, named) in enumerate(WRONG)])
def test_wrong_bodies(client: TestClient, body: dict[str, Any], named: str) -> None:
    response = client.post(URL, json=body)
    assert response.status_code == 400, response.text
    assert named in response.json()["error"]["message"]


def test_an_encoder_decoder_has_none(app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_of(app).engine.model, "whole_prompts", True, raising=False)
    response = client.post(URL, json={"input": "a"})
    assert response.status_code == 400
    assert "encoder-decoder" in response.json()["error"]["message"]
