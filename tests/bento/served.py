"""One running service with tasks of every type, for tests that change none of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ft_resources.ledger import Ledger
from tests.bento.servers import Server, end, start
from tests.bento.writers import write_adapter, write_base


@dataclass(frozen=True)
class Served:
    """A service that answers t1 (ham, spam), t2 (x, y, z), chat (conversations) and read (extraction)."""

    server: Server
    world: Any
    adapters: dict[str, str]
    """Digests by task."""

    @property
    def url(self) -> str:
        return str(self.server.client.base_url)

    def stored(self, prediction_id: str) -> dict[str, Any]:
        """A prediction of the ledger."""
        ledger: Ledger = self.world.ledger
        return ledger.prediction(prediction_id)


@pytest.fixture(scope="session")
def served(make_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The service; whoever uses it leaves its routes alone."""
    root: Path = tmp_path_factory.mktemp("served")
    world = make_world(root / "home")
    base = write_base(root / "base")
    adapters = {"t1": world.first, "t2": world.other}
    for task, extraction in (("chat", False), ("read", True)):
        folder = write_adapter(root / task, base, task=task, seed=len(task), extraction=extraction)
        adapters[task] = world.lake.publish("adapter", folder, {"name": task}).digest
    for task, adapter in adapters.items():
        world.release(task, adapter, "1")
    world.ledger.set_review_below("t2", 0.95, actor="test")
    server = start(root / "home")
    yield Served(server, world, adapters)
    end(server)
    world.ledger.close()
