"""The HTTP application: its endpoints, probes and documentation, behind the service's own door."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse

from bento.access import Access, add_access
from bento.auth import Doorkeeper
from bento.documentation import add_documentation
from bento.front import Front
from bento.keys import KeyRing
from bento.lifecycle import Drain
from bento.limits import RateLimits
from bento.observation import Observer
from bento.tokens import Tokens
from ft_assets.api import adapters, deployments, experiments, runs, stream
from ft_assets.api.refusals import add_handlers, refused
from ft_assets.platform import Platform
from ft_resources.environments import ServiceSettings

logger = logging.getLogger(__name__)
DESCRIPTION = """\
Experiments, runs, deployments and adapters of the platform: what `ft experiments`, `ft run --detach`, `ft status`,
`ft watch`, `ft cancel`, `ft deploy` and `ft undeploy` do, over HTTP.

Callers on this machine need no key. Others send `Authorization: Bearer KEY`, a key of `ft key create` or a token of
POST /auth/token. A `reader` reads what belongs to its tasks, an `owner` also starts and cancels their runs
and deploys them, an `admin` does everything for all tasks.
"""
TAGS = [
    {"name": "runs", "description": "Start a run, ask after it, follow it, cancel it."},
    {"name": "deployments", "description": "An address that answers for a task, in one call."},
    {"name": "experiments", "description": "Trainings that ended, and what MLflow knows of them."},
    {"name": "adapters", "description": "What trainings ended with."},
    {"name": "access", "description": "Tokens for keys; keeping keys."},
    {"name": "probes", "description": "For whatever watches the process; they take no key."},
]


def create_app(platform: Platform, settings: ServiceSettings, drain: Drain, ending: Callable[[], bool]) -> Front:
    """The application of one platform home.

    Args:
        drain: Whether requests are still taken.
        ending: Whether the process is to end, and streams with it.
    """
    secret = settings.jwt_secret or secrets.token_bytes(32)
    tokens = Tokens(secret, public_key=settings.jwt_public_key, issuer=settings.jwt_issuer)
    doors = Doorkeeper(platform.environment.api_keys, settings.auth, tokens)
    doors.ring = KeyRing(platform.ledger)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        assert doors.ring is not None
        doors.ring.watcher.start()
        app.state.access = Access(doors, platform.ledger, settings.rate_limit)
        app.state.warm = asyncio.create_task(asyncio.to_thread(warm, platform))
        drain.install()
        yield
        await asyncio.wait([app.state.warm])
        await asyncio.to_thread(doors.ring.watcher.stop)
        platform.ledger.close()

    app = FastAPI(
        title="Experiments and runs",
        version="1",
        description=DESCRIPTION,
        openapi_tags=TAGS,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.platform = platform
    app.state.streams = stream.Streams(platform, ending)
    for router in (runs.router, stream.router, deployments.router, experiments.router, adapters.router):
        app.include_router(router)
    for path, handler in (("/livez", livez), ("/healthz", livez), ("/readyz", readyz)):
        app.add_api_route(path, handler, methods=["GET"], include_in_schema=path != "/healthz", tags=["probes"])
    add_documentation(app)
    app.add_api_route("/", index, methods=["GET"], include_in_schema=False)
    add_access(app)
    add_handlers(app)
    return Front(
        app,
        app,
        doors=doors,
        limits=RateLimits(settings.rate_limit),
        drain=drain,
        observer=Observer(lines=settings.log == "json"),
        origins=settings.cors_origins,
        seconds=settings.request_seconds,
        answer=refused,
    )


def warm(platform: Platform) -> None:
    """Import and open what the first request would else wait for: seconds."""
    import mlflow.tracking  # noqa: F401

    from ft_assets.definitions import defs

    defs.resolve_asset_graph()
    platform.instance.get_run_ids(limit=1)


async def index() -> RedirectResponse:
    """The documentation."""
    return RedirectResponse("/docs")


async def livez() -> JSONResponse:
    """Whether the process works."""
    return JSONResponse({"alive": True})


async def readyz(request: Request) -> JSONResponse:
    """Whether requests are answered at once: what they need is imported and open."""
    warming: asyncio.Task[None] = request.app.state.warm
    ready = warming.done() and warming.exception() is None
    return JSONResponse({"ready": ready}, status_code=200 if ready else 503)
