"""A run as it goes on, as server-sent events that a caller who lost the connection goes on with where it was.

Every event has an id that says what the caller has seen until then, and nothing is kept of a caller in between: it may
come back to another process. The run's log is counted in lines, the losses of a training in points.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import pydantic
from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

from ft_assets.api.refusals import errors
from ft_assets.api.runs import Run, described, finite, state_of, told, tracker
from ft_assets.api.scope import platform_of
from ft_assets.platform import Platform
from ft_assets.watching import POLL_SECONDS, State
from ft_resources.errors import FtError, RequestError

router = APIRouter(tags=["runs"])
END = "end"
QUIET_SECONDS = 10.0
"""After this long without news a comment is sent, by which proxies and a caller that is gone are noticed."""
MOST_STREAMS = 100
PARTS = {
    "line": "something happened: `{kind, subject, text, seconds}`, as `ft run` prints it",
    "progress": "the run as of GET /runs/{run_id}, with `losses` of further steps and the index of the `first` of them",
    END: "the run as it ended; nothing follows",
}
DESCRIPTION = "Events: " + "; ".join(f"`{name}`: {what}" for name, what in PARTS.items()) + "."
EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string", "enum": list(PARTS)},
        "data": {"type": "string", "contentMediaType": "application/json"},
        "id": {"type": "string"},
        "retry": {"type": "integer", "minimum": 0},
    },
}
POSITION = re.compile(r"(?P<lines>\d{1,9})-(?P<losses>\d{1,9})-(?P<training>[0-9a-f]{0,32})")


class EventStream(StreamingResponse):
    """Server-sent events. (FastAPI's own class leaves a handler no way to answer with another status.)"""

    media_type = "text/event-stream"


class Progress(Run):
    """A run, and losses that were not told before."""

    first: int = pydantic.Field(description="Index of the first of `losses` among all of the training.")
    losses: list[float | None]


@dataclass(frozen=True)
class Position:
    """What a caller has seen of a run."""

    lines: int = 0
    losses: int = 0
    """Of `training`."""
    training: str = ""

    @classmethod
    def of(cls, text: str) -> "Position":
        """The position that an event's id names; the beginning when it names none."""
        found = POSITION.fullmatch(text)
        return cls(int(found["lines"]), int(found["losses"]), found["training"]) if found else cls()

    def __str__(self) -> str:
        return f"{self.lines}-{self.losses}-{self.training}"


class Streams:
    """States of runs, each read about once a second however many callers follow it. Belongs to one event loop.

    Attributes:
        open: How many streams are being sent.
        ending: Whether they are to end, since the process does.
    """

    def __init__(self, platform: Platform, ending: Callable[[], bool]) -> None:
        self._platform, self.ending = platform, ending
        self.open = 0
        self._read: dict[str, tuple[float, asyncio.Task[State]]] = {}

    async def state(self, run_id: str) -> State:
        """Raises:
        RequestError: `tracker_unavailable`.
        """
        now = time.monotonic()
        read = self._read.get(run_id)
        if read is None or now - read[0] >= POLL_SECONDS:
            self._read = {name: one for name, one in self._read.items() if now - one[0] < 2 * QUIET_SECONDS}
            read = self._read[run_id] = now, asyncio.create_task(asyncio.to_thread(self._status, run_id))
        return await asyncio.shield(read[1])

    def _status(self, run_id: str) -> State:
        with tracker():
            return self._platform.status(run_id)


@router.get(
    "/runs/{run_id}/events",
    summary="Follow a run",
    response_class=Response,
    responses={
        200: {"description": DESCRIPTION, "content": {EventStream.media_type: {"itemSchema": EVENT}}},
        204: {"description": "The last event was `end`: there is nothing to come back for."},
        **errors(404),
    },
)
async def events(
    run_id: str,
    request: Request,
    last_event_id: Annotated[
        str, Header(description="Id of the last event that was received; empty: from the start.")
    ] = "",
) -> Response:
    """Log lines, progress and losses of a run until it is over, as server-sent events.

    After a lost connection a browser's `EventSource` asks again by itself with the header `Last-Event-ID`, and gets
    what followed: no line twice, none left out. The API ends a stream after FT_REQUEST_SECONDS; going on is the same.
    """
    await asyncio.to_thread(state_of, request, run_id)
    if last_event_id == END:
        return Response(status_code=204)
    streams: Streams = request.app.state.streams
    if streams.open >= MOST_STREAMS:
        raise RequestError(
            "overloaded",
            f"{MOST_STREAMS} streams are open",
            status=503,
            mend="Ask GET /runs/{run_id} now and then instead.",
            retry_after=10,
        )
    return EventStream(
        _events(streams, platform_of(request), run_id, Position.of(last_event_id), request.state.deadline),
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


async def _events(
    streams: Streams, platform: Platform, run_id: str, seen: Position, deadline: float
) -> AsyncIterator[bytes]:
    log, shown, sent_at = _Log(platform, run_id, seen.lines), "", time.monotonic()
    streams.open += 1
    try:
        yield format_sse_event(retry=int(POLL_SECONDS * 1000))
        while not streams.ending() and time.monotonic() < deadline:
            began = time.monotonic()
            try:
                state = await streams.state(run_id)
            except FtError as error:  # such as a tracker that is away for a while
                yield format_sse_event(comment=error.what)
                await asyncio.sleep(POLL_SECONDS)
                continue
            for line in await asyncio.to_thread(log.further):  # read after the state: at the end none is missing
                seen, sent_at = replace(seen, lines=seen.lines + 1), began
                yield _event("line", line, str(seen))
            if state.training and state.training != seen.training:
                seen = replace(seen, training=state.training, losses=0)
            further = state.losses[seen.losses :]
            progress = told(state)
            if further or progress.model_dump_json() != shown:
                shown, sent_at = progress.model_dump_json(), began
                body = Progress(**progress.model_dump(), first=seen.losses, losses=[finite(one) for one in further])
                seen = replace(seen, losses=seen.losses + len(further))
                yield _event("progress", body.model_dump(), str(seen))
            if state.succeeded is not None:
                run = await asyncio.to_thread(described, platform, state)
                yield _event(END, run.model_dump(), END)
                return
            if began - sent_at > QUIET_SECONDS:
                sent_at = began
                yield format_sse_event(comment="")
            await asyncio.sleep(POLL_SECONDS)
    finally:
        streams.open -= 1


class _Log:
    """What happened in a run, line by line.

    Args:
        skip: Lines that are known.
    """

    def __init__(self, platform: Platform, run_id: str, skip: int) -> None:
        self._platform, self._run_id, self._skip = platform, run_id, skip
        self._follower: Any = None

    def further(self) -> Sequence[dict[str, Any]]:
        """Lines since the last call; none before the run has begun."""
        from ft_assets.following import Follower

        if self._follower is None:
            if not self._platform.instance.has_run(self._run_id):
                return []
            self._follower = Follower(self._platform.instance, self._run_id)
        lines = [asdict(line) for line in self._follower.lines()]
        known = min(self._skip, len(lines))
        self._skip -= known
        return lines[known:]


def _event(name: str, data: dict[str, Any], position: str) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data), id=position)
