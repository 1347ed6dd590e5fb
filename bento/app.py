"""The HTTP application: its endpoints, its probes, its documentation."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.staticfiles import StaticFiles

from bento.access import add_access
from bento.endpoints.openai import add_openai
from bento.endpoints.predictions import add_predictions
from bento.refusals import add_handlers

STATIC = "/static_content"


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
    app.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)
    app.mount(STATIC, StaticFiles(packages=[("bentoml", "_internal/server/static_content")]))
    app.add_api_route("/", index, methods=["GET"], include_in_schema=False)
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


async def docs() -> Response:
    """Swagger UI from files that BentoML carries, so that it works without a network."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Adapter service",
        swagger_js_url=f"{STATIC}/swagger-ui-bundle.js",
        swagger_css_url=f"{STATIC}/swagger-ui.css",
        swagger_favicon_url=f"{STATIC}/favicon-light-32x32.png",
    )


async def index() -> RedirectResponse:
    """The documentation."""
    return RedirectResponse("/docs")
