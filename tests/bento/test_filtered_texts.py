"""Written texts that the content filter refuses, against a real service: nothing of them is sent or recorded."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.bento.servers import Server, end, start
from tests.bento.writers import write_adapter, write_base

SHORT_TEXT = 24
"""Written texts of at most so many characters pass."""


def only_short_texts(task: str, texts: Sequence[str], direction: str) -> str | None:
    """The filter of this service."""
    return "too long" if direction == "output" and any(len(text) > SHORT_TEXT for text in texts) else None


@pytest.fixture(scope="module")
def world(make_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("filtered")
    world = make_world(root / "home")
    folder = write_adapter(root / "chat", write_base(root / "base"), task="chat", seed=4, extraction=False)
    world.release("chat", world.lake.publish("adapter", folder, {"name": "chat"}).digest, "1")
    yield world
    world.ledger.close()


@pytest.fixture(scope="module")
def server(world: Any) -> Iterator[Server]:
    server = start(world.home, FT_CONTENT_FILTER=f"{__name__}:{only_short_texts.__name__}")
    yield server
    end(server)


def test_a_refused_text_is_neither_streamed_nor_answered_nor_recorded(world: Any, server: Server) -> None:
    asked = [{"role": "user", "content": "What is for sale?"}]
    for path, body, count in (
        ("/v1/chat/completions", {"model": "chat", "messages": asked}, "max_tokens"),
        ("/v1/completions", {"model": "chat", "prompt": "What is"}, "max_tokens"),
    ):
        for stream in (False, True):
            before = len(world.stored())
            refused = server.client.post(path, json=body | {count: 60, "stream": stream})
            assert refused.status_code == 400, refused.text
            assert refused.json()["error_code"] == "content_filtered"
            assert len(world.stored()) == before
    refused = server.ask(task="chat", inputs=["What is for sale?"], parameters={"max_tokens": 60})
    assert (refused.status_code, refused.json()["error_code"]) == (422, "content_filtered")


def test_a_text_that_passes_is_streamed_after_it_was_looked_at(world: Any, server: Server) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "What is for sale?"}], "max_tokens": 2}
    whole = server.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert 0 < len(whole) <= SHORT_TEXT
    lines = server.client.post("/v1/chat/completions", json=body | {"stream": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in events if one["choices"]) == whole
    assert events[-1]["prediction_id"] in world.stored()
