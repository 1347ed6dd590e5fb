"""What tests run in processes of their own, told line by line through a pipe."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from ft_assets.training.searching.worker import search_job
from tests.training.small_training import train


@contextmanager
def forked(
    context: ForkServerContext, work: Callable[..., None], *arguments: Any, variables: Mapping[str, str] | None = None
) -> Iterator[tuple[ForkServerProcess, Iterator[str]]]:
    """A process that does `work` in an environment with `variables`, and the lines that it tells until it ends.

    Args:
        work: Gets a function that tells a line, and the arguments.
    """
    told, telling = context.Pipe(duplex=False)
    process = context.Process(target=_working, args=(dict(variables or {}), telling, work, arguments))
    process.start()
    telling.close()
    try:
        yield process, _lines(told)
    finally:
        process.join()


def _working(
    variables: Mapping[str, str], told: Connection, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(variables)
    work(told.send, *arguments)


def _lines(told: Connection) -> Iterator[str]:
    with suppress(EOFError):
        while True:
            yield told.recv()


def train_small(tell: Callable[[str], None], base: str, lake: str, folder: str, precision: str) -> None:
    """A short training."""
    train(base, lake, folder, tell, precision=precision)


def search(tell: Callable[[str], None], job: Mapping[str, Any]) -> None:
    """A search, as its worker does it."""

    def progress(line: str, *, force: bool = False) -> None:
        tell(line)

    search_job(job, progress)  # type: ignore[arg-type]
