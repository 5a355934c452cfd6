"""/health, /version, /metrics, /v1/models, and /admin/weights, which replaces what the server knows.

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

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import Field

from upslope.errors import UpslopeError
from upslope.options.generate import KEY_VARIABLE
from upslope.serving.answers import reply, service_of
from upslope.serving.bodies import ModelBody
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


router = APIRouter(tags=["server"])


class WeightsBody(ModelBody):
    """/admin/weights: where the new weights are, as `upslope serve` would be told; of several models, for which one."""

    source: str = Field(min_length=1, max_length=4096)


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while every model takes requests; 503 while the server drains, and after an engine has failed."""
    state = request.app.state
    broken = [name for name, service in state.services.items() if not service.healthy]
    if state.draining or broken:
        return JSONResponse({"status": "draining" if state.draining else "failed", "models": broken}, 503)
    return JSONResponse({"status": "ok"})


@router.get("/version")
async def version() -> Response:
    """The program's version."""
    return JSONResponse({"version": __version__})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Figures for Prometheus; what they are is said in upslope/serving/admin.py."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """What is being served."""
    return JSONResponse({"object": "list", "data": [_card(s) for s in request.app.state.services.values()]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One served model."""
    service = service_of(request, name)
    return JSONResponse(_card(service), headers={"X-Weight-Version": str(service.version)})


@router.post("/admin/weights")
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
