"""What /metrics says, in Prometheus' text format. Every figure has the label `model`, the name as in /v1/models.

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

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from upslope.serving.service import Service
from upslope.serving.stream import Served

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
