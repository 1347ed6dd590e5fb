"""Reading the bodies of requests: whole, bounded each and all together."""

import asyncio
from collections.abc import Sequence

import pytest
from starlette.types import Message, Receive

from bento.bodies import MAX_BODY, Body, Room
from ft_resources.errors import RequestError


def sending(*chunks: bytes) -> Receive:
    messages: list[Message] = [
        {"type": "http.request", "body": chunk, "more_body": place < len(chunks)}
        for place, chunk in enumerate(chunks, 1)
    ]

    async def receive() -> Message:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    return receive


def body(room: Room, chunks: Sequence[bytes], **headers: bytes) -> Body:
    return Body(room, {name.replace("_", "-").encode(): value for name, value in headers.items()}, sending(*chunks))


def test_bodies_share_a_room_until_they_are_dropped() -> None:
    room = Room(10)
    first, second, third = (body(room, [b"12", b"345"]) for _ in range(3))
    assert asyncio.run(first.read()) == asyncio.run(second.read()) == b"12345"
    with pytest.raises(RequestError) as caught:
        asyncio.run(third.read())
    assert (caught.value.error_code, caught.value.status, caught.value.retry_after) == ("overloaded", 503, 1)
    assert room.taken == 10, "what is refused takes nothing"
    third.drop()
    first.drop()
    first.drop()
    assert room.taken == 5
    assert asyncio.run(body(room, [b"67890"]).read()) == b"67890"


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not() -> None:
    room = Room()
    chunk = bytes(MAX_BODY // 2)
    for one in (body(room, [b"x"], content_length=b"%d" % (MAX_BODY + 1)), body(room, [chunk, chunk, b"x"])):
        with pytest.raises(RequestError) as caught:
            asyncio.run(one.read())
        assert (caught.value.error_code, caught.value.status) == ("input_too_large", 413)
        assert room.taken == 0


def test_who_leaves_in_the_middle_has_sent_nothing() -> None:
    room = Room()

    async def leaving() -> Message:
        return {"type": "http.disconnect"}

    assert asyncio.run(Body(room, {}, leaving).read()) is None
