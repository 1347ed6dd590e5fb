"""The HTTP application: handlers are thin, the work is done by the scorer and the batcher."""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.staticfiles import StaticFiles

from bento.metrics import Subject, metrics
from bento.protocol import (
    ErrorResponse,
    FeedbackRequest,
    FeedbackResponse,
    LiveShare,
    ModelsResponse,
    PredictRequest,
    PredictResponse,
    PredictResult,
    TaskModels,
)
from bento.refusals import CallerGone, add_handlers
from ft_resources.errors import RequestError

if TYPE_CHECKING:
    from bento.batcher import Batcher
    from bento.classify import Scored
    from bento.request_log import Prediction
    from bento.route_watcher import RouteWatcher
    from bento.scorer import Piece, Scorer

T = TypeVar("T")
STATIC = "/static_content"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The body is not JSON.",
        401: "No valid key.",
        404: "Unknown task, version or prediction.",
        413: "Too many or too large inputs.",
        422: "A field is not what the protocol asks for.",
        500: "A fault of the service.",
        503: "Overloaded, not ready, or the log cannot be written; try again later.",
    }.items()
}


@dataclass(frozen=True)
class Backend:
    """What the handlers work with; set on `app.state.backend` once the service has started."""

    scorer: "Scorer"
    batcher: "Batcher[Piece, Scored, list[Prediction]]"
    watcher: "RouteWatcher"


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
    app.add_api_route("/predict", predict, methods=["POST"], response_model=PredictResponse, responses=ERRORS)
    app.add_api_route("/feedback", feedback, methods=["POST"], response_model=FeedbackResponse, responses=ERRORS)
    app.add_api_route("/v1/models", models, methods=["GET"], response_model=ModelsResponse, responses=ERRORS)
    for path in ("/livez", "/healthz"):
        app.add_api_route(path, livez, methods=["GET"], include_in_schema=path == "/livez")
    app.add_api_route("/readyz", readyz, methods=["GET"])
    app.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)
    app.mount(STATIC, StaticFiles(packages=[("bentoml", "_internal/server/static_content")]))
    app.add_api_route("/", index, methods=["GET"], include_in_schema=False)
    add_handlers(app)
    return app


async def predict(body: PredictRequest, request: Request) -> Response:
    """Classify texts. Every answer is recorded before it is sent."""
    backend, arrived, trace_id = _backend(request), request.state.arrived, request.state.trace_id
    scorer = backend.scorer
    if scorer.is_quick(body):
        admitted = scorer.admit(body, trace_id, arrived)
    else:
        admitted = await asyncio.to_thread(scorer.admit, body, trace_id, arrived)
    entry = admitted.entry
    request.state.subject = subject = Subject(body.task, entry.release_id, entry.adapter[:12])
    work = backend.batcher.submit(admitted.pieces, admitted.costs, admitted.answers)
    predictions = await _while_connected(request, work)
    answer = PredictResponse(
        results=[
            PredictResult(
                prediction_id=one.prediction_id,
                label=one.label,
                confidence=one.confidence,
                probabilities=one.probabilities,
            )
            for one in predictions
        ],
        task=body.task,
        model=f"{body.task}@{entry.model_version}",
        model_version=entry.model_version,
        release=entry.release_id,
        adapter=entry.adapter,
        trace_id=trace_id,
        latency_ms=(time.monotonic() - arrived) * 1000,
    )
    metrics().count(subject, "ok", time.monotonic() - arrived, len(predictions))
    metrics().waiting.set(backend.batcher.waiting)
    return Response(answer.model_dump_json(), media_type="application/json")


async def feedback(body: FeedbackRequest, request: Request) -> FeedbackResponse:
    """Say which label an answer should have had, or whether it was right."""
    stored = await asyncio.to_thread(_backend(request).scorer.feedback, body)
    return FeedbackResponse(prediction_id=body.prediction_id, stored=stored, trace_id=request.state.trace_id)


async def models(request: Request) -> ModelsResponse:
    """Released tasks, the adapters that answer them, and the versions that may be asked for."""
    table = _backend(request).scorer.table
    return ModelsResponse(
        data=[
            TaskModels(
                id=task,
                live=[
                    LiveShare(
                        adapter=entry.adapter,
                        model_version=entry.model_version,
                        release=entry.release_id,
                        share=entry.share,
                    )
                    for entry in route.entries
                ],
                versions=list(dict.fromkeys(entry.model_version for entry in (*route.released, *route.entries))),
            )
            for task, route in sorted(table.routes.items())
        ]
    )


async def livez(request: Request) -> JSONResponse:
    """Whether the process works; 503 asks for a restart."""
    backend = request.app.state.backend
    alive = backend is None or backend.watcher.alive
    return JSONResponse({"alive": alive}, status_code=200 if alive else 503)


async def readyz(request: Request) -> JSONResponse:
    """Whether requests are answered; to callers on this machine also with which routes, and what is amiss."""
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


def _backend(request: Request) -> Backend:
    backend = request.app.state.backend
    if not isinstance(backend, Backend):
        raise RequestError("not_ready", "the service is starting", status=503, mend="Try again in a few seconds.")
    return backend


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the caller goes away.

    Raises:
        CallerGone: It did.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise CallerGone
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
