"""What every out-of-process worker shares: the job it is given, the result or typed error it reports.

A typed error is a message and a clean exit: Pipes hands messages on only from a process that ended well. A worker
is `python -m MODULE`, launched through Dagster Pipes by the compute resource. It never imports dagster.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from dagster_pipes import PipesContext, PipesMessageWriter, PipesMessageWriterChannel, open_dagster_pipes

from ft_resources.errors import FtError


class Progress:
    """Lines for people in the Dagster log, at most one every `seconds` unless forced."""

    def __init__(self, pipes: PipesContext, seconds: float = 2.0) -> None:
        self._pipes, self._seconds, self._last = pipes, seconds, 0.0

    def __call__(self, line: str, *, force: bool = False) -> None:
        if force or time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._pipes.log.info(line)


def is_leader() -> bool:
    """Whether this process reports: all but the first of those that torchrun started together do not."""
    return os.environ.get("RANK", "0") == "0"


def serve(work: Callable[[Mapping[str, Any], Progress], dict[str, Any]]) -> None:
    """Run `work(job, progress)` for the launching asset and report what it returns."""
    if not is_leader():
        with open_dagster_pipes(message_writer=_Silent()) as pipes, suppress(FtError):  # the leader has it too
            work(pipes.get_extra("job"), Progress(pipes))
        return
    with open_dagster_pipes() as pipes:
        try:
            pipes.report_custom_message({"result": work(pipes.get_extra("job"), Progress(pipes))})
        except FtError as error:
            description = {"type": type(error).__name__, "what": error.what, "where": error.where, "mend": error.mend}
            pipes.report_custom_message({"error": description})


class _Silent(PipesMessageWriter[PipesMessageWriterChannel]):
    """Says nothing: the leading process reports."""

    @contextmanager
    def open(self, params: Any) -> Iterator[PipesMessageWriterChannel]:
        yield _Nowhere()


class _Nowhere(PipesMessageWriterChannel):
    def write_message(self, message: Any) -> None:
        pass
