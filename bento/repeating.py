"""Work that is done again and again in a thread of its own, until it is stopped."""

import threading
from collections.abc import Callable


class Repeating:
    """Calls `work`, waits `every` seconds, calls it again; a failure of `work` ends the thread.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str, work: Callable[[], object], every: float) -> None:
        self._work, self._every = work, every
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; returns when it has ended."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _repeat(self) -> None:
        while not self._stopping.is_set():
            self._work()
            self._stopping.wait(self._every)
