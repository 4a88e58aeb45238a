"""Counts and times for Prometheus, by its own client (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

disable_created_metrics()   # the time at which each count began, which nobody asks for


class Metrics:
    """Of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=False)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"tryplicity_{name}", help, labels, registry=registry)

        def histogram(name: str, help: str) -> Histogram:
            return Histogram(f"tryplicity_{name}", help, buckets=SECONDS, registry=registry)

        self.requests = counter("requests", "Requests answered, by route, method and status.",
                                "route", "method", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter("cached_tokens", "Tokens of prompts that were not read again.")
        self.completion_tokens = counter("completion_tokens", "Tokens written.")
        self.finished = counter("generations", "Generations ended, by reason.", "reason")
        self.request_seconds = histogram("request_seconds", "From request to the end of the answer.")
        self.first_seconds = histogram("first_token_seconds", "From submission to the first token.")
        self.search_seconds = histogram("search_seconds", "Of one search.")
        self._now = _Now()
        registry.register(self._now)
        ProcessCollector(registry=registry)     # memory, processor time, open files

    def text(self, gauges: Mapping[str, float], accept: str = "") -> tuple[bytes, str]:
        """Everything, and the `gauges` of this moment; and the content type, one of those a scraper accepts."""
        self._now.gauges = gauges
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _Now:
    """What is looked up when it is asked for."""

    gauges: Mapping[str, float] = {}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, value in self.gauges.items():
            yield GaugeMetricFamily(f"tryplicity_{name}", f"{name.replace('_', ' ').capitalize()}, now.", value=value)
