"""How a worker runs and ends: its threads take turns, it refuses requests before it stops, it goes with its parent."""

import asyncio
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

from bento.metrics import metrics

logger = logging.getLogger(__name__)
LOOK = 0.05


class Drain:
    """Counts requests in flight, and on SIGTERM refuses new ones until those are answered.

    Load balancers need a moment to see that /readyz fails, so the worker goes on refusing for `seconds` at least.
    Then the server's own handler of the signal runs, which closes the sockets.

    Args:
        seconds: From the signal to the end, if nothing is in flight.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.draining = False
        self.in_flight = 0
        self._task: asyncio.Task[None] | None = None

    def install(self) -> None:
        """Take over SIGTERM; to be called in the main thread, in the event loop, once the server has its handler."""
        before = signal.getsignal(signal.SIGTERM)
        if not callable(before):
            return
        loop = asyncio.get_running_loop()
        signal.signal(signal.SIGTERM, lambda number, frame: loop.call_soon_threadsafe(self.begin, before))

    def begin(self, finish: Callable[[int, Any], Any]) -> None:
        """Refuse from now on; call `finish(SIGTERM, None)` when it is over."""
        if self.draining:
            return
        self.draining = True
        logger.info("draining: %s requests are in flight", self.in_flight)
        self._task = asyncio.get_running_loop().create_task(self._wait(finish))

    async def _wait(self, finish: Callable[[int, Any], Any]) -> None:
        until = time.monotonic() + self.seconds
        while time.monotonic() < until or self.in_flight:
            await asyncio.sleep(LOOK)
        finish(signal.SIGTERM, None)


class Usage:
    """CPU time and memory of this process as metrics, at most once per second."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._next = 0.0

    def measure(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 1
        cpu = self._process.cpu_times()
        metrics().cpu_seconds.set(cpu.user + cpu.system)
        metrics().memory.set(self._process.memory_info().rss)


def end_with_parent(seconds: float = 30.0, every: float = 0.25) -> None:
    """Watch the parent process from a thread: when it has died, drain, and end by force after `seconds`.

    BentoML's supervisor takes its workers along when it is told to stop, but not when it is killed.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        logger.error("the supervisor has died, this worker ends")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def take_turns() -> None:
    """Let threads that wake wait until the one that runs has used its time slice, where Linux schedules them.

    By default every request that comes in takes the core from the thread that computes, and the caches with it: on one
    core a tenth of the throughput on short texts. To be called in the first thread, of which the others inherit it.
    """
    with suppress(AttributeError, OSError):  # another system, or a container that forbids it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def drop_timers(app: Any) -> None:
    """Take BentoML's timers out of a chain of ASGI middlewares; the front keeps the time of each request.

    They hold on to every request until its time is up, answered or not: 2 KB each, for five minutes.

    Args:
        app: The outermost middleware; each has the next one in `app`.
    """
    while (following := getattr(app, "app", None)) is not None:
        if type(following).__name__ == "TimeoutMiddleware":
            app.app = following.app
        else:
            app = following


def settle() -> None:
    """Keep what start-up made out of the garbage collector's way; to be called when the first adapters are loaded.

    torch and transformers leave half a million objects that never go. The collector looked through them every few
    hundred requests: half of a short request's time outside the model, and pauses of 0.2 s.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
