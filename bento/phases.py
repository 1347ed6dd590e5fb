"""How long each phase of a request took: tokenise, queue, compute, log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Name = Literal["tokenise", "queue", "compute", "log"]
NAMES: tuple[Name, ...] = ("tokenise", "queue", "compute", "log")


class Phase(NamedTuple):
    """A stretch of time, in monotonic seconds."""

    name: Name
    start: float
    end: float


@dataclass
class Phases:
    """The phases of one request, in the order they ended."""

    spent: list[Phase] = field(default_factory=list)

    def add(self, name: Name, start: float, end: float) -> None:
        self.spent.append(Phase(name, start, end))

    @contextmanager
    def __call__(self, name: Name) -> Iterator[None]:
        """Time what is done inside."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(name, start, time.monotonic())

    @contextmanager
    def answering(self, began: Callable[[], float | None]) -> Iterator[None]:
        """Time what is done inside as queue until the moment that `began` tells at its end, then as compute.

        Args:
            began: None: it never did.
        """
        start = time.monotonic()
        try:
            yield
        finally:
            end, moment = time.monotonic(), began()
            self.add("queue", start, end if moment is None else max(start, moment))
            if moment is not None:
                self.add("compute", max(start, moment), end)
