"""Counts and times in Prometheus's text format, which is short enough to write by hand: no dependency for it
(https://prometheus.io/docs/instrumenting/exposition_formats/). Used from the event loop only."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number that only grows, one for each set of labels."""

    def __init__(self, name: str, help: str) -> None:
        self.name, self.help = name, help
        self.values: dict[Labels, float] = {}

    def add(self, amount: float = 1, **labels: str) -> None:
        key = tuple(labels.items())
        self.values[key] = self.values.get(key, 0) + amount

    def lines(self) -> Iterable[str]:
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} counter"
        for labels, value in self.values.items():
            yield f"{self.name}{_labels(labels)} {value:.17g}"


class Histogram:
    """How many observations, in seconds, were up to each bound."""

    def __init__(self, name: str, help: str, bounds: tuple[float, ...] = SECONDS) -> None:
        self.name, self.help, self.bounds = name, help, bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def lines(self) -> Iterable[str]:
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} histogram"
        total = 0
        for bound, count in zip([*(f"{b:g}" for b in self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            yield f'{self.name}_bucket{{le="{bound}"}} {total}'
        yield f"{self.name}_sum {self.sum:.17g}"
        yield f"{self.name}_count {total}"


class Metrics:
    def __init__(self) -> None:
        self.requests = Counter("tryplicity_requests_total", "Requests answered, by route, method and status.")
        self.prompt_tokens = Counter("tryplicity_prompt_tokens_total", "Tokens of prompts.")
        self.cached_tokens = Counter("tryplicity_cached_tokens_total", "Tokens of prompts that were not read again.")
        self.completion_tokens = Counter("tryplicity_completion_tokens_total", "Tokens written.")
        self.finished = Counter("tryplicity_generations_total", "Generations ended, by reason.")
        self.request_seconds = Histogram("tryplicity_request_seconds", "From request to the end of the answer.")
        self.first_seconds = Histogram("tryplicity_first_token_seconds", "From submission to the first token.")
        self.search_seconds = Histogram("tryplicity_search_seconds", "Of one search.")

    def text(self, gauges: Mapping[str, float]) -> str:
        """Everything, and the `gauges` of this moment."""
        lines = [line for metric in vars(self).values() for line in metric.lines()]
        for name, value in gauges.items():
            lines += [f"# TYPE tryplicity_{name} gauge", f"tryplicity_{name} {float(value):.17g}"]
        return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels) + "}" if labels else ""
