"""How many requests a caller may send: a token bucket (Turner 1986) per caller; and how large each may be."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

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
