"""Prometheus metrics of the service.

They are made on first use: BentoML sets the folder its processes share only after it has imported the service, and
the Prometheus client reads that setting when it is imported.
"""

import functools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bento.phases import NAMES, Phases

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram

SUBJECT = ("task", "release", "version", "adapter")
LABELS = (*SUBJECT, "outcome")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
PHASE_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
KEPT = 4096
"""Subjects that are told apart in one process: its series are never given back."""
DETAILED = 256
"""Those of them that have histograms of their own: 74 series and 80 KB each, and /metrics lists them all."""


@dataclass(frozen=True)
class Subject:
    """What a request was about; empty where that is not known. Callers' own words never become label values."""

    task: str = ""
    release: str = ""
    adapter: str = ""
    """First 12 digits of the digest."""
    version: str = ""

    @property
    def labels(self) -> tuple[str, str, str, str]:
        """Values of `SUBJECT`."""
        return self.task, self.release, self.version, self.adapter


OTHERS = Subject("other", "other", "other", "other")
"""Whatever there is no room for."""


@dataclass(frozen=True)
class Metrics:
    """Every metric of the service; `outcome` is `ok` or an error code."""

    requests: "Counter"
    seconds: "Histogram"
    phases: "Histogram"
    predictions: "Counter"
    tokens: "Counter"
    waiting: "Gauge"
    adapters: "Gauge"
    route_errors: "Gauge"
    cpu_seconds: "Gauge"
    memory: "Gauge"

    def count(
        self,
        subject: Subject,
        outcome: str,
        seconds: float,
        *,
        predictions: int = 0,
        tokens: tuple[int, int] = (0, 0),
        phases: Phases | None = None,
    ) -> None:
        """One request that asked for an answer of a model.

        Args:
            tokens: Read and written.
        """
        series = _series(subject, outcome)
        series.requests.inc()
        series.seconds.observe(seconds)
        if predictions:
            series.predictions.inc(predictions)
        for number, counter in zip(tokens, series.tokens, strict=True):
            if number:
                counter.inc(number)
        for phase in phases.spent if phases is not None else ():
            series.phases[phase.name].observe(phase.end - phase.start)


@dataclass(frozen=True)
class _Series:
    requests: "Counter"
    seconds: "Histogram"
    predictions: "Counter"
    tokens: "tuple[Counter, Counter]"
    phases: "dict[str, Histogram]"


class Room:
    """Gives places to subjects until there are none left; those that come later share one. Safe in any thread."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._taken: set[Subject] = set()
        self._lock = threading.Lock()

    def place(self, subject: Subject) -> Subject:
        """`subject` itself, or `OTHERS`."""
        with self._lock:
            if subject not in self._taken:
                if len(self._taken) >= self._places:
                    return OTHERS
                self._taken.add(subject)
            return subject


_counted, _detailed = Room(KEPT), Room(DETAILED)


@functools.lru_cache(KEPT)
def _series(subject: Subject, outcome: str) -> _Series:
    of, labels, detailed = metrics(), _counted.place(subject).labels, _detailed.place(subject).labels
    return _Series(
        requests=of.requests.labels(*labels, outcome),
        seconds=of.seconds.labels(*detailed, outcome),
        predictions=of.predictions.labels(*labels),
        tokens=(of.tokens.labels(*labels, "input"), of.tokens.labels(*labels, "output")),
        phases={name: of.phases.labels(*detailed, name) for name in NAMES},
    )


@functools.cache
def metrics() -> Metrics:
    """The metrics of this process."""
    from prometheus_client import Counter, Gauge, Histogram

    return Metrics(
        requests=Counter("ft_requests", "Requests that ask a model.", LABELS),
        seconds=Histogram(
            "ft_request_seconds", "Time from a request's arrival to its answer.", LABELS, buckets=SECONDS
        ),
        phases=Histogram(
            "ft_phase_seconds", "Time of one phase of an answer.", (*SUBJECT, "phase"), buckets=PHASE_SECONDS
        ),
        predictions=Counter("ft_predictions", "Inputs answered and recorded.", SUBJECT),
        tokens=Counter("ft_tokens", "Tokens read (input) and written (output).", (*SUBJECT, "direction")),
        waiting=Gauge("ft_waiting_tokens", "Tokens that wait for the engine.", multiprocess_mode="livesum"),
        adapters=Gauge("ft_loaded_adapters", "Adapters in memory.", multiprocess_mode="livemax"),
        route_errors=Gauge("ft_route_errors", "Routes that could not be put in force.", multiprocess_mode="livemax"),
        cpu_seconds=Gauge("ft_cpu_seconds", "CPU time of the workers that run.", multiprocess_mode="livesum"),
        memory=Gauge("ft_memory_bytes", "Resident memory of the workers that run.", multiprocess_mode="livesum"),
    )
