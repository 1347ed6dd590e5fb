"""Giving an idle GPU back: a training that neither computes on its GPU nor says a word is ended, and saved before.

It is suspected after a quiet time, and ended only if it is still so one quiet time later.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from ft_resources.compute import GRACE_SECONDS
from ft_resources.errors import TrainingError

QUIET_SECONDS = 15 * 60.0
"""Without a line, and without work on the GPU, for this long: suspected."""
BUSY_PERCENT = 10.0
"""GPU utilisation from which it works."""
SAMPLE_SECONDS = 1.0

Verdict = Literal["busy", "suspected", "idle"]


class IdleWatch:
    """Judges by samples whether a GPU is held for nothing.

    Args:
        clock: Seconds on a clock that never goes back.
        quiet: Seconds without a line and without work until it is suspected, and from then on until it is confirmed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, quiet: float = QUIET_SECONDS) -> None:
        self._clock, self.quiet = clock, quiet
        self._active = clock()
        self._suspected: float | None = None

    def output(self) -> None:
        """A line was written."""
        self._active, self._suspected = self._clock(), None

    def sample(self, gpu_utilisation: float | None) -> None:
        """The GPU was looked at.

        Args:
            gpu_utilisation: Percent; None where it is not known, which counts as work.
        """
        if gpu_utilisation is None or gpu_utilisation >= BUSY_PERCENT:
            self._active, self._suspected = self._clock(), None

    def verdict(self) -> Verdict:
        """`busy`; `suspected` once it was quiet; `idle` if it still is that long after it was first found so."""
        now = self._clock()
        if now - self._active < self.quiet:
            return "busy"
        if self._suspected is None:
            self._suspected = now
        return "suspected" if now - self._suspected < self.quiet else "idle"


@contextmanager
def reclaimed_when_idle(
    watch: IdleWatch, lines: Sequence[str], gpu_utilisation: Callable[[], float | None], warn: Callable[[str], None]
) -> Iterator[None]:
    """End the training inside, as SIGTERM does, once its GPU is confirmed to be idle.

    A process that does not react within `GRACE_SECONDS` hangs, and is killed: its last checkpoint is on the lake.

    Args:
        lines: What it has written so far; it grows.
        gpu_utilisation: The newest sample, as of `IdleWatch.sample`.
        warn: Adds one line when the GPU is suspected to be idle, and one when it is reclaimed.

    Raises:
        TrainingError: It was ended, and its state is saved.
    """
    over, asked = threading.Event(), threading.Event()
    minutes = f"{watch.quiet / 60:g} minutes"

    def look() -> None:
        seen, before = len(lines), "busy"
        while not over.wait(SAMPLE_SECONDS):
            if len(lines) > seen:
                seen = len(lines)
                watch.output()
            watch.sample(gpu_utilisation())
            verdict = watch.verdict()
            if verdict == "suspected" and before != verdict:
                warn(f"the GPU stood idle and nothing was written for {minutes}: still so in {minutes}, training ends")
                seen += 1
            if verdict == "idle":
                warn("the GPU is given back: training is saved and ends")
                asked.set()
                os.kill(os.getpid(), signal.SIGTERM)
                if not over.wait(GRACE_SECONDS):
                    os.kill(os.getpid(), signal.SIGKILL)
                return
            before = verdict

    thread = threading.Thread(target=look, name="idle", daemon=True)
    thread.start()
    try:
        yield
    except Exception as error:
        from ft_assets.training.engine.trainer import Interrupted

        if asked.is_set() and isinstance(error, Interrupted):
            raise TrainingError(
                f"the GPU stood idle, and nothing was written, for {minutes} and {minutes} more: it was given back",
                where="training",
                mend=f"Look for what it waited for at the end of logs.txt; another run goes on from here ({error}).",
            ) from error
        raise
    finally:
        over.set()
        thread.join()
