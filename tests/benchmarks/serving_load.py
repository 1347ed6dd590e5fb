"""An HTTP load generator that costs little: bare sockets, requests made beforehand, bodies left as they are."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """One answered request."""

    request: int
    """Place of the request in the list that was sent."""
    status: int
    """0: the connection broke."""
    body: bytes
    sent_at: float
    """Seconds of `time.perf_counter`."""
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Load:
    """What one run of the generator saw."""

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    """From the first request to the last answer."""

    @property
    def failures(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status != 200]

    def latency(self, share: float) -> float:
        """The quantile `share` of the latency in seconds."""
        ordered = sorted(answer.seconds for answer in self.answers)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def post(path: str, body: Mapping[str, Any]) -> bytes:
    """The bytes of a request on a kept connection."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head.encode() + f"content-length: {len(content)}\r\n\r\n".encode() + content


@dataclass(frozen=True)
class Turn:
    """What a client sends next."""

    place: int
    request: bytes
    at: float = 0.0
    """Not before this, in seconds of `time.perf_counter`."""


class Client(asyncio.Protocol):
    """One kept connection: takes the next turn when the last request is answered; ends when there is none.

    Args:
        following: The next turn.
        keep: Gets every answer.
    """

    def __init__(self, following: Callable[[], Turn | None], keep: Callable[[Answer], None]) -> None:
        self._following, self._keep = following, keep
        self._buffer = b""
        self._turn: Turn | None = None
        self._sent = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._next()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        match = LENGTH.search(self._buffer, 0, end)
        size = int(match[1]) if match else 0
        if len(self._buffer) < end + 4 + size:
            return
        status, body = int(self._buffer[9:12]), self._buffer[end + 4 : end + 4 + size]
        self._buffer = b""
        self._answered(status, body)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._answered(0, repr(exc).encode())
            self.done.set_result(None)

    def _answered(self, status: int, body: bytes) -> None:
        if self._turn is not None:
            self._keep(Answer(self._turn.place, status, body, self._sent, time.perf_counter() - self._sent))

    def _next(self) -> None:
        self._turn = self._following()
        if self._turn is None:
            self.done.set_result(None)
            self._transport.close()
            return
        wait = self._turn.at - time.perf_counter()
        if wait > 0:
            asyncio.get_running_loop().call_later(wait, self._send, self._turn)
        else:
            self._send(self._turn)

    def _send(self, turn: Turn) -> None:
        self._sent = time.perf_counter()
        self._transport.write(turn.request)


async def connected(
    port: int, clients: int, following: Callable[[], Turn | None], keep: Callable[[Answer], None]
) -> None:
    """Runs `clients` connections to their ends."""
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Client(following, keep), "127.0.0.1", port) for _ in range(clients)]
    await asyncio.gather(*(client.done for _, client in made))


def run_load(port: int, requests: Sequence[bytes], clients: int, seconds: float, first: int = 0) -> Load:
    """`clients` connections, each with one request in flight, for `seconds`; then what is in flight is awaited."""
    load = Load()
    began = time.perf_counter()
    place = first

    def following() -> Turn | None:
        nonlocal place
        if time.perf_counter() - began >= seconds:
            return None
        place += 1
        return Turn(place % len(requests), requests[place % len(requests)])

    asyncio.run(connected(port, clients, following, load.answers.append))
    load.seconds = time.perf_counter() - began
    return load
