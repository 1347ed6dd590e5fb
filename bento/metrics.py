"""Prometheus metrics of the service.

They are made on first use: BentoML sets the folder its processes share only after it has imported the service, and
the Prometheus client reads that setting when it is imported.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram

LABELS = ("task", "release", "adapter", "outcome")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Subject:
    """What a request was about; empty where that is not known. Callers' own words never become label values."""

    task: str = ""
    release: str = ""
    adapter: str = ""
    """First 12 digits of the digest."""


@dataclass(frozen=True)
class Metrics:
    """Every metric of the service; `outcome` is `ok` or an error code."""

    requests: "Counter"
    seconds: "Histogram"
    predictions: "Counter"
    waiting: "Gauge"
    adapters: "Gauge"
    route_errors: "Gauge"

    def count(self, subject: Subject, outcome: str, seconds: float, predictions: int = 0) -> None:
        """One answered request to /predict."""
        labels = (subject.task, subject.release, subject.adapter, outcome)
        self.requests.labels(*labels).inc()
        self.seconds.labels(*labels).observe(seconds)
        if predictions:
            self.predictions.labels(*labels[:3]).inc(predictions)


@functools.cache
def metrics() -> Metrics:
    """The metrics of this process."""
    from prometheus_client import Counter, Gauge, Histogram

    return Metrics(
        requests=Counter("ft_requests", "Requests to /predict.", LABELS),
        seconds=Histogram(
            "ft_request_seconds", "Time from a request's arrival to its answer.", LABELS, buckets=SECONDS
        ),
        predictions=Counter("ft_predictions", "Texts answered and recorded.", LABELS[:3]),
        waiting=Gauge("ft_waiting_tokens", "Tokens that wait for the engine.", multiprocess_mode="livesum"),
        adapters=Gauge("ft_loaded_adapters", "Adapters in memory.", multiprocess_mode="livemax"),
        route_errors=Gauge("ft_route_errors", "Routes that could not be put in force.", multiprocess_mode="livemax"),
    )
