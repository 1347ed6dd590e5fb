"""Memory that a worker does not keep: timers of requests, series of metrics."""

import asyncio
from typing import Any

import httpx
import pytest
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from bento import metrics
from bento.lifecycle import drop_timers
from bento.metrics import OTHERS, Room, Subject
from bento.phases import Phases


def test_timers_of_answered_requests_are_not_kept() -> None:
    async def timers(*, drop: bool) -> int:
        middleware = [
            Middleware(GZipMiddleware),
            Middleware(TimeoutMiddleware, timeout=100.0),
            Middleware(TimeoutMiddleware, timeout=100.0),
        ]
        app = Starlette(routes=[Route("/", lambda _: PlainTextResponse("here"))], middleware=middleware)
        app.middleware_stack = app.build_middleware_stack()
        if drop:
            drop_timers(app.middleware_stack)
        loop = asyncio.get_running_loop()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            assert (await client.get("/")).text == "here"
        return sum(timer.when() > loop.time() + 50 for timer in loop._scheduled)  # type: ignore[attr-defined]

    assert asyncio.run(timers(drop=False)) == 2
    assert asyncio.run(timers(drop=True)) == 0


def test_series_of_releases_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_counted", Room(3))
    monkeypatch.setattr(metrics, "_detailed", Room(1))
    metrics._series.cache_clear()
    phases = Phases()
    phases.add("compute", 1.0, 3.0)
    subjects = [Subject("bounded", f"release {number}", f"{number:012d}", str(number)) for number in range(6)]
    for subject in (*subjects, *reversed(subjects)):
        metrics.metrics().count(subject, "ok", 2.0, predictions=1, phases=phases)

    def value(name: str, subject: Subject, **more: str) -> float | None:
        labels: dict[str, Any] = dict(zip(metrics.SUBJECT, subject.labels, strict=True))
        return REGISTRY.get_sample_value(name, labels | more)

    assert [value("ft_requests_total", one, outcome="ok") for one in (*subjects, OTHERS)] == [2, 2, 2, *[None] * 3, 6]
    for name, more in (
        ("ft_request_seconds_count", {"outcome": "ok"}),
        ("ft_phase_seconds_count", {"phase": "compute"}),
    ):
        assert [value(name, one, **more) for one in (*subjects, OTHERS)] == [2, *[None] * 5, 10]
    metrics._series.cache_clear()
