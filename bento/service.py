"""The BentoML service: `bentoml serve bento.service:AdapterService`, or a built Bento.

Settings come from the environment (`ft_resources.environments`): FT_HOME, FT_LAKE, FT_LEDGER, FT_DEVICE,
FT_ADAPTER_MEMORY_MB, FT_API_KEYS, and those of `ServiceSettings`. A `release.json` beside the packages makes the Bento
answer without a ledger's route.
"""

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import bentoml
from starlette.types import Receive, Scope, Send

from bento.access import Access
from bento.app import create_app
from bento.auth import Doorkeeper
from bento.backend import Backend
from bento.front import Front
from bento.lifecycle import Drain, Usage, end_with_parent, settle, take_turns
from bento.limits import RateLimits
from bento.logs import use_json
from bento.memory import keep_memory
from bento.metrics import metrics
from bento.observation import Observer
from bento.tokens import Tokens
from bento.tracing import Tracer
from bento.try_page import PATH as TRY_PAGE
from ft_resources.environments import Environment, ServiceSettings, share_secret

if TYPE_CHECKING:
    from bento.admitted import Answers, Failed, Measured, Piece
    from bento.classify import Scored

# Threads of a matrix product must sleep while they wait: by default they spin, and on a machine with as many busy
# threads as cores that stretched answers from 0.02 to over 1 second. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# oneDNN compiles a kernel for each shape and keeps 1,024 of them by default: 0.4 GB. A quarter is enough, because
# sizes are rounded (`bento.shapes`).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
keep_memory()
ROOT = Path(__file__).resolve().parent.parent
share_secret()
settings = ServiceSettings.read()
doors = Doorkeeper(
    Environment.read().api_keys,
    settings.auth,
    Tokens(settings.jwt_secret, public_key=settings.jwt_public_key, issuer=settings.jwt_issuer),
)
drain = Drain(settings.drain_seconds)
observer = Observer(lines=settings.log == "json")
app = create_app()


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """`app`, as an application BentoML cannot look into: every path it does not serve itself comes here."""
    await app(scope, receive, send)


@bentoml.service(
    name="adapter_service",
    workers=settings.workers,
    # the front keeps the time of each request, and takes BentoML's timers out
    traffic={"timeout": settings.request_seconds + 5},
    tracing={"excluded_urls": ".*"},  # `Tracer` exports spans; BentoML would make five of each request for nobody
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(application, path="/")
class AdapterService:
    """Predictions of released adapters: one base model in memory, adapters by digest, routes from the ledger."""

    def __init__(self) -> None:
        # imported here: BentoML imports this module in its parent process too, which needs no torch
        from bento.batcher import Batcher
        from bento.devices import PASS_TOKENS, pick_device
        from bento.embedding import Embedder
        from bento.keys import KeyRing
        from bento.route_watcher import RouteWatcher
        from bento.scorer import Scorer
        from ft_resources.lake import Lake
        from ft_resources.ledger import Ledger
        from ft_resources.usage import usable_cores

        take_turns()
        if settings.log == "json":
            use_json()
        environment = Environment.read()
        self._ledger = Ledger(environment.ledger)
        doors.ring = self._keys = KeyRing(self._ledger)
        self._usage = Usage()
        self._settled = False
        self._scorer = Scorer.of(
            environment,
            settings,
            Lake(environment.lake),
            self._ledger,
            baked=ROOT,
            threads=max(1, usable_cores() // settings.workers) if settings.workers > 1 else None,
            follow=False,
        )
        self._batcher: Batcher[Piece, Scored | Failed, Answers | Measured] = Batcher(
            self._scorer.compute,
            self._scorer.record,
            batch_cost=PASS_TOKENS[pick_device(environment.device).type],
            most_cost=settings.request_tokens,
        )
        self._watcher = RouteWatcher(self._scorer.routes, after=self._measure)
        self._embedder = Embedder(settings.request_tokens)
        watchers = (self._watcher, self._keys.watcher)
        app.state.backend = Backend(self._scorer, self._batcher, watchers, self._embedder)
        app.state.access = Access(doors, self._ledger, settings.rate_limit)

    def _measure(self) -> None:
        metrics().route_errors.set(len(self._scorer.routes.errors))
        metrics().adapters.set(len(self._scorer.store.loaded))
        metrics().waiting.set(self._batcher.waiting)
        self._usage.measure()
        if not self._settled and self._scorer.routes.ready:
            self._settled = True
            settle()

    @bentoml.on_startup
    async def start(self) -> None:
        """Begin to follow the routes; /readyz tells when the first ones are in force."""
        if settings.otlp:
            observer.tracer = Tracer(settings.otlp)
        drain.install()
        end_with_parent()
        self._keys.watcher.start()
        self._watcher.start()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """Answer what is in the queue, then let go of everything."""
        app.state.backend = app.state.access = None
        for watcher in (self._watcher, self._keys.watcher):
            await asyncio.to_thread(watcher.stop)
        await self._batcher.close()
        await asyncio.to_thread(self._embedder.close)
        await asyncio.to_thread(self._scorer.close)
        if observer.tracer is not None:
            await asyncio.to_thread(observer.tracer.close)
        self._ledger.close()


AdapterService.add_asgi_middleware(  # type: ignore[attr-defined]
    Front,
    own=app,
    doors=doors,
    limits=RateLimits(settings.rate_limit, settings.workers),
    drain=drain,
    observer=observer,
    origins=settings.cors_origins,
    seconds=settings.request_seconds,
    pages=[TRY_PAGE],
)
