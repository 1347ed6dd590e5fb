"""Two replicas behind what a Service of Kubernetes does: one of them goes, as a deleted pod does, and another comes."""

import asyncio
import http.client
import itertools
import json
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from ft_resources.ledger import Ledger
from ft_resources.ledger_schema import predictions
from tests.bento.servers import Server, end, start
from tests.resources.charts import Chart, container, pod
from tests.resources.conftest import PROGRAMS, postgres  # noqa: F401

LAG = 1.5
"""Seconds from a pod's deletion until no host sends new connections to it; most clusters take less."""
LOOK = 0.2
"""Seconds between two looks at /readyz."""
BREATH = 0.02
"""Seconds from an answer to the caller's next request."""
KEPT = 2.0
"""Seconds for which a pool keeps a connection: less than the chart's pause."""
CHART = Chart(
    "service",
    "replicas",
    {
        "image": {"repository": "registry/ft", "tag": "1"},
        "ledger": {"secret": "ledger"},
        "access": {"secret": "access"},
        "lake": {"url": "s3://bucket/lake", "credentialsSecret": "bucket"},
    },
)


class Balancer:
    """Gives each new connection to the next of the replicas whose /readyz is 200 and that are not deleted.

    A connection stays where it is until an end closes it, as with a Service: nothing is read of what it carries.
    """

    def __init__(self) -> None:
        self.given: Counter[int] = Counter()
        """Connections by port of a replica."""
        self.port = 0
        self._replicas: dict[int, bool] = {}
        self._turn = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Balancer":
        self._thread.start()
        wait(lambda: self.port > 0)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @property
    def ready(self) -> list[int]:
        return [port for port, ready in list(self._replicas.items()) if ready]

    def add(self, server: Server) -> None:
        self._replicas[port_of(server)] = False

    def forget(self, server: Server) -> None:
        self._replicas.pop(port_of(server))

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        listening = self._loop.run_until_complete(asyncio.start_server(self._pass_on, "127.0.0.1", 0))
        self.port = listening.sockets[0].getsockname()[1]
        looking = self._loop.create_task(self._look())
        self._loop.run_forever()
        for task in (looking, *asyncio.all_tasks(self._loop)):
            task.cancel()
        listening.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _look(self) -> None:
        async with httpx.AsyncClient(timeout=5) as client:
            while True:
                for port in list(self._replicas):
                    try:
                        ready = (await client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200
                    except httpx.TransportError:
                        ready = False
                    if port in self._replicas:
                        self._replicas[port] = ready
                await asyncio.sleep(LOOK)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chosen = self.ready[next(self._turn) % len(self.ready)]
        self.given[chosen] += 1
        there, back = await asyncio.open_connection("127.0.0.1", chosen)
        with suppress(asyncio.CancelledError):
            await asyncio.gather(copied(reader, back), copied(there, writer))


async def copied(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Bytes until there are no more, or the other side has gone."""
    with suppress(ConnectionError):
        while content := await source.read(1 << 16):
            sink.write(content)
            await sink.drain()
    sink.close()


@dataclass
class Callers:
    """Threads that ask again and again: with a connection each time, a pool's, or one that is never closed."""

    port: int
    token: str
    expected: dict[str, tuple[str, float]]
    """Label and its probability by text."""
    answered: list[str] = field(default_factory=list)
    """Ids of answers in time's order."""
    failures: list[str] = field(default_factory=list)
    sent_on: list[dict[str, Any]] = field(default_factory=list)
    """Refusals on connections that are never closed."""
    stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Callers":
        kinds = (0.0, 0.0, KEPT, KEPT, None)
        self._threads = [threading.Thread(target=self._ask, args=(seconds,)) for seconds in kinds]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self._threads:
            thread.join()

    def more(self, number: int, seconds: float = 60) -> None:
        """Wait for so many further answers."""
        goal = len(self.answered) + number
        wait(lambda: len(self.answered) >= goal or bool(self.failures), seconds)
        assert self.failures == []

    def _ask(self, keep: float | None) -> None:
        texts = itertools.cycle(self.expected)
        connection, since = self._connected(), time.monotonic()
        while not self.stopping.wait(BREATH):
            if keep is not None and time.monotonic() - since > keep:
                connection.close()
                connection, since = self._connected(), time.monotonic()
            text = next(texts)
            try:
                closing, status, content = self._answer(connection, text)
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
                return
            if status == 200:
                self._compare(text, content)
            elif keep is None and status == 503 and closing:
                self.sent_on.append(content)
                connection.close()
                connection = self._connected()
            else:
                self.failures.append(f"{status} {content}")
        connection.close()

    def _connected(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def _answer(self, connection: http.client.HTTPConnection, text: str) -> tuple[bool, int, Any]:
        body = json.dumps({"task": "t1", "inputs": [text]})
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.token}"}
        connection.request("POST", "/predict", body, headers)
        response = connection.getresponse()
        return response.will_close, response.status, json.loads(response.read())

    def _compare(self, text: str, content: Any) -> None:
        (result,) = content["results"]
        label, probability = self.expected[text]
        if result["label"] != label or abs(result["confidence"] - probability) > 0.05:
            self.failures.append(f"{result} is not {label} with {probability}")
        self.answered.append(result["prediction_id"])


def port_of(server: Server) -> int:
    port = server.client.base_url.port
    assert port is not None
    return port


def wait(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def ledger(world: Any, request: pytest.FixtureRequest) -> Iterator[Ledger]:
    """The one of all replicas: in PostgreSQL where it is installed, else in SQLite."""
    if not all(map(shutil.which, PROGRAMS)):
        yield world.ledger
        return
    opened = Ledger(request.getfixturevalue("postgres"))
    yield opened
    opened.close()


@pytest.fixture
def new_replica(world: Any, ledger: Ledger, tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    """Starts a replica with the settings of the chart, a home of its own, and the lake and ledger of all."""
    settings = CHART.rendered()["ConfigMap"]["data"]
    started: list[Server] = []

    def new(name: str) -> Server:
        home = tmp_path / name
        home.mkdir()
        shared = {"FT_LAKE": world.lake.url, "FT_LEDGER": ledger.url, "FT_JWT_SECRET": "the same for all " * 2}
        started.append(start(home, **{**settings, "FT_HOME": str(home), **shared}))
        return started[-1]

    yield new
    with ThreadPoolExecutor() as pool:
        list(pool.map(end, started))


@pytest.mark.slow
def test_a_replica_is_deleted_and_another_comes_without_a_failed_request(
    world: Any,
    ledger: Ledger,
    workshop: Any,
    adapter_folders: dict[str, Path],
    new_replica: Callable[[str], Server],
) -> None:
    deployment = CHART.rendered()["Deployment"]
    pause = int(container(deployment)["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = pod(deployment)["terminationGracePeriodSeconds"]
    assert pause > max(LAG, KEPT)
    replace(world, ledger=ledger).release("t1", world.first, "1")
    labels = ("ham", "spam")
    rows = workshop.peft_probabilities(adapter_folders["first"], workshop.texts)
    expected = {
        text: (labels[row.argmax()], float(row.max()))
        for text, row in zip(workshop.texts, rows, strict=True)
        if abs(row[0] - row[1]) > 0.1
    }
    assert len(expected) >= 3
    with ThreadPoolExecutor() as pool, Balancer() as balancer:
        leaving, staying = pool.map(new_replica, ("one", "two"))
        for server in (leaving, staying):
            balancer.add(server)
        wait(lambda: len(balancer.ready) == 2)
        # a token of one replica is good for the other
        key = {"authorization": "Bearer key-of-the-test"}
        token = leaving.client.post("/auth/token", headers=key).json()["access_token"]
        with Callers(balancer.port, token, expected) as callers:
            callers.more(60)
            assert min(balancer.given[port_of(server)] for server in (leaving, staying)) > 5

            deleted = time.monotonic()
            time.sleep(LAG)
            balancer.forget(leaving)
            time.sleep(deleted + pause - time.monotonic())  # the chart's preStop
            leaving.process.send_signal(signal.SIGTERM)
            leaving.process.wait(grace - pause)
            assert leaving.process.returncode == 0
            callers.more(30)

            coming = new_replica("three")
            balancer.add(coming)
            wait(lambda: balancer.given[port_of(coming)] > 5)
            callers.more(30)
    assert callers.failures == []
    assert len(callers.answered) == len(set(callers.answered))
    engine = sa.create_engine(ledger.url)
    with engine.connect() as connection:
        recorded = set(connection.scalars(sa.select(predictions.c.id)))
    engine.dispose()
    assert set(callers.answered) <= recorded, "each is in the ledger that the replicas share"
    assert len(callers.sent_on) <= 1, "only the connection that outlived the pause is sent on, once"
    assert all(content["error_code"] == "not_ready" for content in callers.sent_on)
