"""What the handlers of requests share: the engines behind them, who is told what, callers who leave."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from bento.auth import permit
from bento.metrics import Subject
from bento.protocol import ErrorResponse
from bento.repeating import Repeating
from bento.routing import RouteEntry
from ft_resources.errors import RequestError

if TYPE_CHECKING:
    from bento.admitted import Answers, Failed, Measured, Piece
    from bento.batcher import Batcher
    from bento.classify import Scored
    from bento.embedding import Embedder
    from bento.request_log import Prediction
    from bento.scorer import Scorer
    from bento.texts import Prompted

logger = logging.getLogger(__name__)
T = TypeVar("T")
Made = TypeVar("Made", "Answers", "Measured")
REFUSALS = {
    400: "The body is not JSON; below /v1/ also: a parameter is not what the protocol asks for, or not supported.",
    401: "No valid key.",
    403: "The key is not for this task.",
    404: "Unknown task, version or prediction.",
    408: "The body did not arrive in time.",
    413: "Too many or too large inputs.",
    422: "A field is not what the protocol asks for, or the content filter refuses it.",
    429: "The caller sends more requests than it may.",
    500: "A fault of the service.",
    503: "Overloaded, not ready, or the log cannot be written; try again later.",
    504: "There was no answer within the time allowed.",
}


class CallerGone(Exception):
    """The caller closed the connection before the answer was there."""


@dataclass(frozen=True)
class Backend:
    """What the handlers work with; set on `app.state.backend` once the service has started."""

    scorer: "Scorer"
    batcher: "Batcher[Piece, Scored | Failed, Answers | Measured]"
    watchers: Sequence[Repeating]
    """Threads without which the service would follow neither routes nor keys."""
    embedder: "Embedder"


def errors(*without: int) -> dict[int | str, dict[str, Any]]:
    """The refusals that an endpoint may answer with, for OpenAPI."""
    return {
        status: {"model": ErrorResponse, "description": text}
        for status, text in REFUSALS.items()
        if status not in without
    }


def backend_of(request: Request) -> Backend:
    """Raises:
    RequestError: `not_ready`.
    """
    backend = request.app.state.backend
    if not isinstance(backend, Backend):
        raise RequestError("not_ready", "the service is starting", status=503, mend="Try again in a few seconds.")
    return backend


def backend_for(request: Request, task: str) -> Backend:
    """`backend_of`, for a caller who may use `task`, which there is.

    Raises:
        RequestError: `forbidden`; `not_ready`; `unknown_task`, which tells of the caller's tasks only.
    """
    permit(request, task)
    backend = backend_of(request)
    backend.scorer.table.route(task, request.state.caller.tasks)
    return backend


def about(request: Request, task: str, entry: RouteEntry) -> None:
    """Note for metrics and traces what the request turned out to be about."""
    request.state.subject = Subject(task, entry.release_id, entry.adapter[:12], entry.model_version)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the caller goes away.

    Raises:
        CallerGone: It did.
    """
    task = asyncio.current_task()
    assert task is not None
    waiting = True

    def gone(_: "asyncio.Task[None]") -> None:
        if waiting:
            task.cancel()

    leaving = asyncio.ensure_future(disconnect(request))
    leaving.add_done_callback(gone)
    try:
        return await work
    except asyncio.CancelledError:
        if leaving.done():
            task.uncancel()
            raise CallerGone from None
        raise
    finally:
        waiting = False
        leaving.cancel()


async def computed(
    request: Request,
    backend: Backend,
    task: str,
    pieces: "Sequence[Piece]",
    costs: Sequence[int],
    finish: "Callable[[Sequence[Scored | Failed]], Made]",
) -> "Made":
    """What `finish` makes of the texts of a request, computed in turn with those of others.

    Raises:
        RequestError: See `Batcher.submit`.
        CallerGone: The caller went away first.
    """
    state = request.state
    work = backend.batcher.submit(
        pieces,
        costs,
        finish,
        task=task,
        caller=state.caller.name,
        deadline=state.deadline,
        phases=state.phases,
    )
    made: Any = await while_connected(request, work)
    return made


async def measured(
    request: Request, backend: Backend, task: str, pieces: "Sequence[Piece]"
) -> "tuple[list[Scored], int]":
    """What the engine gives for texts that are not recorded, and how many tokens they have."""
    from bento.admitted import Measured

    costs = [len(piece.encoded.ids) for piece in pieces]
    return (await computed(request, backend, task, pieces, costs, Measured)).whole(), sum(costs)


async def disconnect(request: Request) -> None:
    """Returns when the caller is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def record_cut_off(backend: Backend, prompted: "Prompted", predictions: "Sequence[Prediction]") -> None:
    """Record, in a thread, what was written for a caller who is gone and the content filter lets pass."""
    from bento.admitted import Answers

    def record() -> None:
        try:
            backend.scorer.record([Answers(prompted.checked(predictions))])
        except RequestError as error:
            logger.warning("answers that were cut off are not recorded: %s", error)

    asyncio.get_running_loop().run_in_executor(None, record)
