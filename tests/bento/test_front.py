"""The time a request may take, whether its answer has begun or not."""

import asyncio
import json
from typing import Any

import pytest

from bento import front
from bento.auth import Doorkeeper
from bento.front import Front
from bento.lifecycle import Drain
from bento.limits import RateLimits
from bento.observation import Observer


@pytest.mark.parametrize("begins", [True, False])
def test_no_answer_goes_on_without_end(monkeypatch: pytest.MonkeyPatch, begins: bool) -> None:
    monkeypatch.setattr(front, "READ_SECONDS", 0.05)
    ended: list[str] = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        try:
            if begins:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            await asyncio.Event().wait()
        finally:
            ended.append(scope["path"])

    drain, sent = Drain(1.0), list[Any]()

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope: Any = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [(b"x-timeout-ms", b"50"), (b"authorization", b"Bearer key-of-the-test")],
        "client": ("127.0.0.1", 1),
    }
    app = Front(
        endless,
        endless,
        doors=Doorkeeper(("key-of-the-test",)),
        limits=RateLimits(None),
        drain=drain,
        observer=Observer(),
        seconds=300,
    )
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 60))
    assert ended == ["/v1/chat/completions"]
    assert drain.in_flight == 0
    assert scope["state"]["outcome"] == "deadline_exceeded"
    if begins:
        assert [one["type"] for one in sent] == ["http.response.start"], "the connection is to be closed"
    else:
        assert sent[0]["status"] == 504
        assert json.loads(sent[1]["body"])["error_code"] == "deadline_exceeded"
