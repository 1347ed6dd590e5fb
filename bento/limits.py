"""Requests: how many a caller may send, a token bucket (Turner 1986) per caller; how large; how many at a time."""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from bento.auth import Caller
from ft_resources.errors import RequestError

MOST_BUCKETS = 10_000


def check_tokens(tokens: int, most: int) -> None:
    """Let a request with `tokens` tokens pass, or refuse it.

    Raises:
        RequestError: `input_too_large`.
    """
    if tokens > most:
        raise RequestError(
            "input_too_large", f"the request has {tokens:,} tokens", status=413, mend=f"Send at most {most:,} tokens."
        )


class InFlight:
    """Counts requests that are on their way. Safe in any thread.

    Args:
        most: More than these are refused.
        what: What they are called.
    """

    def __init__(self, most: int, what: str = "requests") -> None:
        self._most, self._what, self._count = most, what, 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Count one more.

        Raises:
            RequestError: `overloaded` (503).
        """
        with self._lock:
            if self._count >= self._most:
                raise RequestError(
                    "overloaded",
                    f"{self._count} {self._what} are on their way already",
                    status=503,
                    mend="Try again later, with fewer requests at a time.",
                )
            self._count += 1

    def leave(self, _: "Future[Any]") -> None:
        """Count one less: a callback of the future that answers it."""
        with self._lock:
            self._count -= 1


@dataclass
class _Bucket:
    filled: float
    at: float


class RateLimits:
    """Buckets that hold a minute's worth of requests and fill up again at the same rate. Belongs to one event loop.

    Args:
        default: Requests per minute of callers whose key names no rate; None: no limit. Callers that were let in
            because they stand on this machine have none.
        workers: Processes that share the load: each allows its part.
        clock: Monotonic seconds.
    """

    def __init__(self, default: float | None, workers: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._default, self._workers, self._clock = default, workers, clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, caller: Caller) -> None:
        """Count one request.

        Raises:
            RequestError: `rate_limited` (429) with the seconds until the next one is allowed.
        """
        rate = None if caller.local else caller.rate or self._default
        if rate is None:
            return
        now, per_second = self._clock(), rate / 60 / self._workers
        most = max(1.0, rate / self._workers)
        bucket = self._buckets.setdefault(caller.key_id or caller.name, _Bucket(most, now))
        bucket.filled = min(most, bucket.filled + (now - bucket.at) * per_second)
        bucket.at = now
        if bucket.filled < 1:
            wait = math.ceil((1 - bucket.filled) / per_second)
            raise RequestError(
                "rate_limited",
                f"more than {rate:g} requests per minute",
                status=429,
                mend=f"Try again in {wait} s.",
                retry_after=wait,
            )
        bucket.filled -= 1
        if len(self._buckets) > MOST_BUCKETS:  # a full bucket allows what a new one does
            idle = now - 60
            self._buckets = {name: one for name, one in self._buckets.items() if one.at > idle}
