"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) that end with their reader."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"


def event(json: str) -> bytes:
    """One event with a JSON text."""
    return b"data: " + json.encode() + b"\n\n"


class EventStream(Response):
    """Sends events as they come; `events` is closed when the caller goes away, so that it can stop its work.

    The status is sent with the first event: what `events` raises before it is answered as any other refusal.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.status_code, self.background, self._events = 200, None, events
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.ensure_future(_gone(receive))
        started = False
        try:
            while True:
                coming = asyncio.ensure_future(anext(self._events, None))
                try:
                    await asyncio.wait((coming, leaving), return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        return
                finally:
                    if not coming.done():
                        coming.cancel()
                        with contextlib.suppress(asyncio.CancelledError):
                            await coming
                chunk = coming.result()
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": chunk or b"", "more_body": chunk is not None})
                if chunk is None:
                    return
        finally:
            leaving.cancel()
            await self._events.aclose()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
