"""The BentoML service: `bentoml serve bento.service:AdapterService`, or a built Bento.

Settings come from the environment (`ft_resources.environments`): FT_HOME, FT_LAKE, FT_LEDGER, FT_DEVICE,
FT_MAX_ADAPTERS, FT_API_KEYS. A `release.json` beside the packages makes the Bento answer without a ledger's route.
"""

import asyncio
import os
from pathlib import Path

import bentoml
from starlette.types import Receive, Scope, Send

from bento.app import Backend, create_app
from bento.front import Front
from bento.metrics import metrics
from ft_resources.environments import Environment

# Threads of a matrix product must sleep while they wait: by default they spin, and on a machine with as many busy
# threads as cores that stretched answers from 0.02 to over 1 second. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
app = create_app()


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """`app`, as an application BentoML cannot look into: every path it does not serve itself comes here."""
    await app(scope, receive, send)


@bentoml.service(name="adapter_service", workers=1, traffic={"timeout": 600}, logging={"access": {"enabled": False}})
@bentoml.asgi_app(application, path="/")
class AdapterService:
    """Predictions of released adapters: one base model in memory, adapters by digest, routes from the ledger."""

    def __init__(self) -> None:
        # imported here: BentoML imports this module in its parent process too, which needs no torch
        from bento.batcher import Batcher
        from bento.devices import PASS_TOKENS, pick_device
        from bento.route_watcher import RouteWatcher
        from bento.scorer import Scorer
        from ft_resources.lake import Lake
        from ft_resources.ledger import Ledger

        environment = Environment.read()
        self._ledger = Ledger(environment.ledger)
        self._scorer = Scorer.open(
            Lake(environment.lake),
            self._ledger,
            baked=ROOT,
            max_adapters=environment.max_adapters,
            device=environment.device,
            follow=False,
        )
        self._batcher = Batcher(
            self._scorer.compute,
            self._scorer.record,
            batch_cost=PASS_TOKENS[pick_device(environment.device).type],
        )
        self._watcher = RouteWatcher(self._scorer.routes, after=self._measure)
        app.state.backend = Backend(self._scorer, self._batcher, self._watcher)

    def _measure(self) -> None:
        metrics().route_errors.set(len(self._scorer.routes.errors))
        metrics().adapters.set(len(self._scorer.store.loaded))
        metrics().waiting.set(self._batcher.waiting)

    @bentoml.on_startup
    def start(self) -> None:
        """Begin to follow the routes; /readyz tells when the first ones are in force."""
        self._watcher.start()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """Answer what is in the queue, then let go of everything."""
        app.state.backend = None
        await asyncio.to_thread(self._watcher.stop)
        await self._batcher.close()
        self._ledger.close()


AdapterService.add_asgi_middleware(Front, own=app, keys=Environment.read().api_keys)  # type: ignore[attr-defined]
