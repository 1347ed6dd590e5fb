"""The HTTP application: its endpoints, its probes, its documentation."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from bento.access import add_access
from bento.documentation import add_documentation
from bento.endpoints.openai import add_openai
from bento.endpoints.predictions import add_predictions
from bento.refusals import add_handlers
from bento.try_page import add_try_page


def create_app() -> FastAPI:
    """The application without a backend: not ready until `app.state.backend` is set."""
    app = FastAPI(
        title="Adapter service",
        version="1",
        description="Predictions of released LoRA adapters.",
        docs_url=None,
        redoc_url=None,
    )
    app.state.backend = None
    add_predictions(app)
    add_openai(app)
    for path in ("/livez", "/healthz"):
        app.add_api_route(path, livez, methods=["GET"], include_in_schema=path == "/livez")
    app.add_api_route("/readyz", readyz, methods=["GET"])
    add_documentation(app)
    add_try_page(app)
    add_access(app)
    add_handlers(app)
    return app


async def livez(request: Request) -> JSONResponse:
    """Whether the process works; 503 asks for a restart."""
    backend = request.app.state.backend
    alive = backend is None or (all(watcher.alive for watcher in backend.watchers) and backend.scorer.alive)
    return JSONResponse({"alive": alive}, status_code=200 if alive else 503)


async def readyz(request: Request) -> JSONResponse:
    """Whether requests are answered; to callers that need no key also with which routes, and what is amiss."""
    backend = request.app.state.backend
    routes = None if backend is None else backend.scorer.routes
    ready = routes is not None and routes.ready
    content: dict[str, Any] = {"ready": ready}
    if routes is not None and request.state.local:
        content["routes"] = {task: route.revision for task, route in sorted(routes.table.routes.items())}
        content["errors"] = routes.errors
    return JSONResponse(content, status_code=200 if ready else 503)
