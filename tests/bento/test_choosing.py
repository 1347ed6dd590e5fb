"""Which adapter answers: several on one base model, chosen by version or by header, released while others answer."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.bento.servers import Server, end, start

RELEASE_SECONDS = 120
"""From a passed gate to the first answer, as it is promised for several models at once."""


@pytest.fixture(scope="module")
def world(make_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    world = make_world(tmp_path_factory.mktemp("choosing"))
    world.release("t1", world.first, "1")
    yield world
    world.ledger.close()


@pytest.fixture(scope="module")
def server(world: Any) -> Iterator[Server]:
    server = start(world.home)
    yield server
    end(server)


def asked(server: Server, task: str, path: str = "/predict", header: str | None = None, **more: Any) -> httpx.Response:
    given = {"input": "Win a cruise"} if path == "/explain" else {"inputs": ["Win a cruise"]}
    headers = {} if header is None else {"x-model-version": header}
    return server.client.post(path, json={"task": task, **given, **more}, headers=headers)


def test_three_models_released_at_once_answer_with_one_base_in_memory(
    world: Any, server: Server, workshop: Any
) -> None:
    assert asked(server, "t1").json()["base_model"] == workshop.base.reference
    before = resident(server)
    began = time.monotonic()
    released = {
        "t1": world.release("t1", world.second, "2"),
        "t2": world.release("t2", world.other, "1"),
        "t3": world.release("t3", world.first, "1"),
    }
    waiting = dict(released)
    while waiting:
        assert time.monotonic() - began < RELEASE_SECONDS, waiting
        for task, release in list(waiting.items()):
            answer = asked(server, task)
            if answer.status_code == 200 and answer.json()["release"] == release:
                del waiting[task]
    weights = sum(file.stat().st_size for file in Path(workshop.base.path).glob("*.safetensors"))
    assert weights > 5e7
    assert resident(server) - before < weights / 2, "another base model was loaded"


def resident(server: Server) -> int:
    """Bytes of memory of the service's processes."""
    main = psutil.Process(server.process.pid)
    return sum(one.memory_info().rss for one in (main, *main.children(recursive=True)))


@pytest.mark.parametrize("path", ["/predict", "/explain"])
def test_a_gateway_chooses_by_header(world: Any, server: Server, path: str) -> None:
    for wanted, adapter in (("1", world.first), ("2", world.second), (world.first[:10], world.first)):
        answer = asked(server, "t1", path, wanted).json()
        assert answer["adapter"] == adapter
        assert asked(server, "t1", path, wanted, model_version=wanted).json()["adapter"] == adapter
    for header, more, status, code in (
        ("99", {}, 404, "unknown_version"),
        ("1", {"model_version": "2"}, 422, "invalid_request"),
        ("", {}, 422, "invalid_request"),
        ("1" * 129, {}, 422, "invalid_request"),
    ):
        refused = asked(server, "t1", path, header, **more)
        assert (refused.status_code, refused.json()["error_code"]) == (status, code), refused.text


def test_the_header_is_documented(server: Server) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    for path in ("/predict", "/explain"):
        assert [one["name"] for one in paths[path]["post"]["parameters"]] == ["x-model-version"]
