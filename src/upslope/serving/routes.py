"""The routes that draw nothing: what the server is and knows, and what a model makes of texts as they are.

/health, /version, /metrics, /v1/models; /admin/weights, which replaces what the server knows; /tokenize, /detokenize,
/tokenizer_info in the shapes of vLLM's server; /v1/embeddings.

An embedding is the mean of a text's last hidden states, of length 1. A decoder that was trained to predict tokens
gives usable but not excellent ones; they are what its own representation offers. The hidden states are those of the
packed forward pass, after the last norm, in the model's dtype; mean and norm are taken in float32.

/metrics is in Prometheus' text format. Every figure has the label `model`, the name as in /v1/models.

upslope_requests_total{route,status,model}        answered HTTP requests (a stream counts when it starts); `model` is
                                                  empty where a request is about no model, or was refused before that
upslope_requests_running{model}                   sequences in the engine's batch
upslope_requests_waiting{model}                   requests of which nothing runs yet
upslope_prompt_tokens_total{model}                tokens of accepted prompts
upslope_cached_tokens_total{model}                of these, found in the prefix cache
upslope_generated_tokens_total{model}             drawn tokens
upslope_weight_version{model}                     number of the present weights
upslope_time_to_first_token_seconds{model}        histogram, one value per finished request
upslope_time_per_output_token_seconds{model}      histogram, mean time between a finished request's tokens
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Annotated, Any, Literal

import fastapi
import numpy as np
import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import Discriminator, Field, Tag

from upslope.errors import UpslopeError
from upslope.models.attention.context import PackedContext
from upslope.models.protocol import CausalModel
from upslope.options.inference import KEY_VARIABLE
from upslope.serving.answers import encode_all, reply, service_of, while_connected
from upslope.serving.bodies import ConversationBody, Items, ModelBody, Prompt, Token, UserBody
from upslope.serving.chat import prompt_tokens
from upslope.serving.engine_thread import Served, Stopped
from upslope.serving.errors import ApiError
from upslope.serving.service import Service
from upslope.version import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_EACH = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)

# Figures that a service knows itself: what is said of each, and the attribute that has it.
_FIGURES: tuple[tuple[Any, str, str, str], ...] = (
    (CounterMetricFamily, "prompt_tokens", "Tokens of accepted prompts", "prompt_tokens"),
    (CounterMetricFamily, "cached_tokens", "Prompt tokens found in the prefix cache", "engine.stats.cached_tokens"),
    (CounterMetricFamily, "generated_tokens", "Drawn tokens", "engine.stats.generated_tokens"),
    (GaugeMetricFamily, "requests_running", "Sequences in the engine's batch", "running"),
    (GaugeMetricFamily, "requests_waiting", "Requests of which nothing runs yet", "waiting"),
    (GaugeMetricFamily, "weight_version", "Number of the present weights", "version"),
)


class Metrics:
    """One application's figures, in a registry of their own."""

    def __init__(self, services: Mapping[str, Service]) -> None:
        self._services = services
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "upslope_requests", "Answered HTTP requests", ["route", "status", "model"], registry=self.registry
        )
        self._first = self._histogram("time_to_first_token", "From request to first token", _FIRST)
        self._each = self._histogram("time_per_output_token", "Mean time between a request's tokens", _EACH)
        self.registry.register(self)
        for name, service in services.items():
            service.observe = lambda served, name=name: self._observe(name, served)

    def answered(self, route: str, status: int, model: str) -> None:
        """Count an answer."""
        self._requests.labels(route, str(status), model).inc()

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Any]:
        """The figures that the services know themselves; called by the registry."""
        for family, name, says, read in _FIGURES:
            metric = family(f"upslope_{name}", says, labels=["model"])
            for model, service in self._services.items():
                metric.add_metric([model], attrgetter(read)(service))
            yield metric

    def _histogram(self, name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"upslope_{name}_seconds", says, ["model"], buckets=buckets, registry=self.registry)

    def _observe(self, name: str, served: Served) -> None:
        self._first.labels(name).observe(served.first_token_seconds)
        if served.token_seconds is not None:
            self._each.labels(name).observe(served.token_seconds)


router = APIRouter()


class WeightsBody(ModelBody):
    """/admin/weights: where the new weights are, as `upslope serve` would be told; of several models, for which one."""

    source: str = Field(min_length=1, max_length=4096)


@router.get("/health", tags=["server"])
async def health(request: Request) -> Response:
    """200 while every model takes requests; 503 while the server drains, and after an engine has failed."""
    state = request.app.state
    broken = [name for name, service in state.services.items() if not service.healthy]
    if state.draining or broken:
        return JSONResponse({"status": "draining" if state.draining else "failed", "models": broken}, 503)
    return JSONResponse({"status": "ok"})


@router.get("/version", tags=["server"])
async def version() -> Response:
    """The program's version."""
    return JSONResponse({"version": __version__})


@router.get("/metrics", tags=["server"])
async def metrics(request: Request) -> Response:
    """Figures for Prometheus; what they are is said in upslope/serving/routes.py."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE)


@router.get("/v1/models", tags=["server"])
async def models(request: Request) -> Response:
    """What is being served."""
    return JSONResponse({"object": "list", "data": [_card(s) for s in request.app.state.services.values()]})


@router.get("/v1/models/{name:path}", tags=["server"])
async def model(request: Request, name: str) -> Response:
    """One served model."""
    service = service_of(request, name)
    return JSONResponse(_card(service), headers={"X-Weight-Version": str(service.version)})


@router.post("/admin/weights", tags=["server"])
async def weights(request: Request, body: WeightsBody) -> Response:
    """Replace a model's weights by another folder's of the same network, while requests run; none is dropped.

    The answer names the model. Where several are served, the request must.
    """
    if request.app.state.settings.key is None:
        raise ApiError(
            403,
            f"weights can be replaced only where the server has an API key: start it with --api-key or {KEY_VARIABLE}",
            code="no_api_key_configured",
        )
    service = service_of(request, body.model, guess=False)
    try:
        now = await service.swap(body.source)
    except Stopped:
        raise
    except (UpslopeError, OSError) as error:
        raise ApiError(400, f"the weights stay as they are: {error}", "source", "weights_refused") from error
    return reply(service, {"model": service.name, "source": service.source, "version": now}, version=now)


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "upslope",
        "root": service.source,
        "max_model_len": service.max_positions,
        "weight_version": service.version,
        "system_fingerprint": service.fingerprint(),
    }


class _Tokenize(ModelBody):
    return_token_strs: bool = False


class TokenizeTextBody(_Tokenize):
    """/tokenize: a text."""

    prompt: str
    add_special_tokens: bool = True


class TokenizeChatBody(_Tokenize, ConversationBody):
    """/tokenize: a conversation, as the chat template writes it."""


def _kind(data: Any) -> str:
    chat = data.get("messages") is not None if isinstance(data, dict) else isinstance(data, TokenizeChatBody)
    return "(chat)" if chat else "(text)"


TokenizeBody = Annotated[
    Annotated[TokenizeTextBody, Tag("(text)")] | Annotated[TokenizeChatBody, Tag("(chat)")],
    Discriminator(_kind),
    fastapi.Body(),
]


class DetokenizeBody(ModelBody):
    """/detokenize: tokens."""

    tokens: Annotated[list[Token], Items]


@router.post("/tokenize", tags=["tokens"])
async def tokenize(request: Request, body: TokenizeBody) -> Response:
    """The tokens of a text or of a conversation; with return_token_strs also what each stands for."""
    service = service_of(request, body.model)
    if isinstance(body, TokenizeTextBody):
        (tokens,) = await encode_all(service, [body.prompt], special=body.add_special_tokens)
    else:
        tokens = await service.aside(prompt_tokens, service, body, size=body.size)
    names = None
    if body.return_token_strs:
        names = await service.aside(lambda: [service.pieces.text(token) for token in tokens], size=len(tokens))
    answer = {"count": len(tokens), "max_model_len": service.max_positions, "tokens": tokens, "token_strs": names}
    return reply(service, answer)


@router.post("/detokenize", tags=["tokens"])
async def detokenize(request: Request, body: DetokenizeBody) -> Response:
    """The text of tokens, special ones included."""
    service = service_of(request, body.model)
    limit = service.engine.model.spec.input_vocab_size
    wrong = next((token for token in body.tokens if token >= limit), None)
    if wrong is not None:
        raise ApiError(400, f"token {wrong} is outside the vocabulary of {limit} tokens", "tokens")
    decode = partial(service.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return reply(service, {"prompt": await service.aside(decode, size=len(body.tokens))})


@router.get("/tokenizer_info", tags=["tokens"])
async def tokenizer_info(request: Request, model: str | None = None) -> Response:
    """The tokenizer's special tokens and chat template, so that a client needs no tokenizer of its own."""
    service = service_of(request, model)
    tokenizer = service.target
    info: dict[str, Any] = {
        "tokenizer_class": type(tokenizer).__name__,
        "model_max_length": service.max_positions,
        "vocab_size": len(tokenizer),
        "chat_template": tokenizer.chat_template,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
    }
    return reply(service, info)


MAX_INPUTS = 2048
BATCH_TOKENS = 2048
"""Tokens of one forward pass; between two of them the engine goes on with what others have asked."""


class EmbeddingBody(UserBody):
    """/v1/embeddings: texts, or texts as tokens."""

    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="The first so many numbers, made of length 1 again.")


@torch.inference_mode()
def embed(model: CausalModel, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Mean-pooled last hidden states of the prompts, L2-normalised: float32 [N, D], each by its prompt alone."""
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=model.device)
    hidden_TD = model(tokens, PackedContext(lengths, device=model.device))
    means_ND = torch.stack([rows.float().mean(0) for rows in hidden_TD.split(lengths)])
    return torch.nn.functional.normalize(means_ND, dim=-1).cpu().numpy()


def batches(prompts: Sequence[Sequence[int]], limit: int) -> Iterator[Sequence[Sequence[int]]]:
    """The prompts in order, in groups of at most `limit` tokens (a longer prompt alone)."""
    first = total = 0
    for i, prompt in enumerate(prompts):
        if i > first and total + len(prompt) > limit:
            yield prompts[first:i]
            first, total = i, 0
        total += len(prompt)
    yield prompts[first:]


@router.post("/v1/embeddings", tags=["embeddings"])
async def embeddings(request: Request, body: EmbeddingBody) -> Response:
    """One vector per input, in order."""
    service = service_of(request, body.model)
    model = service.engine.model
    if model.whole_prompts:
        raise ApiError(400, f"{service.name} is an encoder-decoder; embeddings are made by decoders", "model")
    width = model.spec.hidden_size
    if body.dimensions is not None and body.dimensions > width:
        raise ApiError(400, f"dimensions is {body.dimensions}; {service.name} has {width}", "dimensions")
    prompts = await tokens_of(service, body)
    vectors, version = await while_connected(request, vectors_of(service, prompts))
    if body.dimensions is not None:
        vectors = shortened(vectors, body.dimensions)
    data = [{"object": "embedding", "index": i, "embedding": _written(v, body)} for i, v in enumerate(vectors)]
    total = sum(map(len, prompts))
    answer = {"object": "list", "data": data, "model": service.name}
    answer["usage"] = {"prompt_tokens": total, "total_tokens": total}
    return reply(service, answer, version=version)


async def tokens_of(service: Service, body: EmbeddingBody) -> list[list[int]]:
    """The inputs as tokens. ApiError 400 for an empty or too long one, and for a token outside the vocabulary."""
    given: list[Any] = body.input if isinstance(body.input, list) else [body.input]
    if given and isinstance(given[0], int):
        given = [given]
    if not given:
        raise ApiError(400, "input is an empty list", "input")
    if len(given) > MAX_INPUTS:
        raise ApiError(400, f"{len(given)} inputs in one request; at most {MAX_INPUTS} are taken", "input")
    prompts = await encode_all(service, given) if isinstance(given[0], str) else given
    limit, size = service.engine.model.spec.max_positions, service.engine.model.spec.vocab_size
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ApiError(400, f"input {i} has no tokens", "input")
        if len(prompt) > limit:
            says = f"input {i} has {len(prompt)} tokens, the model's context holds {limit}; shorten it"
            raise ApiError(400, says, "input", "context_length_exceeded")
        if max(prompt) >= size:
            raise ApiError(400, f"input {i}: token {max(prompt)} is outside the vocabulary of {size} tokens", "input")
    return prompts


async def vectors_of(service: Service, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, int]:
    """The embeddings [N, D] and the version of the weights, which is one for all: a swap in between begins anew."""
    while True:
        version = service.version
        parts = []
        for batch in batches(prompts, BATCH_TOKENS):
            made, under = await service.call(lambda batch=batch: (embed(service.engine.model, batch), service.version))
            if under != version:
                break
            parts.append(made)
        else:
            return np.concatenate(parts), version


def shortened(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The first numbers of each vector, of length 1 again (where they are not all zero)."""
    cut = vectors[:, :dimensions]
    length = np.linalg.norm(cut, axis=1, keepdims=True)
    return cut / np.where(length > 0, length, 1)


def _written(vector: np.ndarray, body: EmbeddingBody) -> list[float] | str:
    plain = body.encoding_format == "float"
    return vector.tolist() if plain else base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
