"""Bodies of requests: read whole, bounded each and all together."""

import asyncio
from collections.abc import Mapping

from starlette.types import Receive

from ft_resources.errors import RequestError

MAX_BODY = 32 * 2**20
ALL_BODIES = 8 * MAX_BODY
DRAINED = 8 * MAX_BODY
"""Bytes of a refused body that are read and dropped, so that the caller gets to read the refusal."""
BODY_SECONDS = 60.0


class Room:
    """Bytes that the bodies of all requests in flight may take together. Belongs to one event loop."""

    def __init__(self, most: int = ALL_BODIES) -> None:
        self.most, self.taken = most, 0


class Body:
    """The body of one request; `drop` it when the request is over."""

    def __init__(self, room: Room, headers: Mapping[bytes, bytes], receive: Receive) -> None:
        self._room, self._headers, self._receive = room, headers, receive
        self._chunks: list[bytes] = []
        self._held = 0

    async def read(self) -> bytes | None:
        """All of it; None when the caller went away before its end.

        Raises:
            RequestError: `input_too_large`; `overloaded`, others take all the room; `invalid_request` when it does not
                come to an end in time.
        """
        length = self._headers.get(b"content-length", b"0")
        too_large, no_room = length.isdigit() and int(length) > MAX_BODY, False
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    too_large = too_large or size > MAX_BODY
                    no_room = no_room or self._room.taken + len(chunk) > self._room.most
                    if too_large or no_room:
                        self.drop()
                    else:
                        self._keep(chunk)
                    if not message.get("more_body", False) or size > DRAINED:
                        break
        except TimeoutError:
            raise RequestError(
                "invalid_request",
                f"the body did not arrive within {BODY_SECONDS:g} s",
                status=408,
                mend="Send it faster.",
            ) from None
        if too_large:
            raise RequestError(
                "input_too_large",
                f"the body is larger than {MAX_BODY // 2**20} MiB",
                status=413,
                mend="Send fewer or shorter inputs.",
            )
        if no_room:
            raise RequestError(
                "overloaded",
                "the requests in flight take all the room there is for bodies",
                status=503,
                mend="Try again in a few seconds.",
                retry_after=1,
            )
        content, self._chunks = b"".join(self._chunks), []
        return content

    def drop(self) -> None:
        """Give the room back."""
        self._room.taken -= self._held
        self._chunks, self._held = [], 0

    def _keep(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._held += len(chunk)
        self._room.taken += len(chunk)
