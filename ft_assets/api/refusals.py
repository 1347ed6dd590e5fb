"""What the API answers when it refuses: one JSON body for every error, with where it is and how to mend it."""

import logging
from typing import Any, Literal

import pydantic
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError

from bento.front import refusal_headers
from bento.refusals import add_handlers as add_common_handlers
from ft_resources.errors import FtError, RequestError

logger = logging.getLogger(__name__)
Code = Literal[
    "invalid_request",
    "input_too_large",
    "unauthorized",
    "forbidden",
    "unknown_task",
    "unknown_run",
    "unknown_adapter",
    "busy",
    "cannot_cancel",
    "nothing_live",
    "cannot_stop",
    "service",
    "invalid_spec",
    "rate_limited",
    "overloaded",
    "deadline_exceeded",
    "not_ready",
    "log_unavailable",
    "tracker_unavailable",
    "artefact",
    "internal",
]
STATUSES = {
    "unknown_task": 404,
    "unknown_run": 404,
    "busy": 409,
    "cannot_cancel": 409,
    "nothing_live": 409,
    "cannot_stop": 409,
    "invalid_spec": 422,
    "service": 503,
}
"""HTTP status of the platform's own errors, by code; that of others is 500."""
DESCRIPTIONS = {
    400: "The body is not JSON.",
    401: "No valid key.",
    403: "The key is not for this.",
    404: "There is no such task, run or adapter.",
    409: "The task is busy or has no live release, the run is over, or the service is somebody else's.",
    422: "A field is not what the protocol asks for.",
    429: "The caller sends more requests than it may.",
    500: "A fault of the API, or a damaged artefact.",
    503: "Overloaded, not ready, MLflow or the ledger cannot be reached, or the service does not come up.",
}


class Refusal(pydantic.BaseModel):
    """Why there is no answer, and what to do about it."""

    status: Literal["error"] = "error"
    error_code: Code
    message: str
    where: str = pydantic.Field(
        description="Field, task, or file and line that it is about; empty where there is none."
    )
    mend: str = pydantic.Field(description="What to do about it.")
    trace_id: str


def errors(*also: int) -> dict[int | str, dict[str, Any]]:
    """The refusals that an endpoint may answer with, for OpenAPI: those that every one may, and `also`."""
    return {
        status: {"model": Refusal, "description": DESCRIPTIONS[status]}
        for status in sorted({401, 403, 422, 429, 500, 503, *also})
    }


def add_handlers(app: FastAPI) -> None:
    """Let `app` answer every error as `Refusal`."""
    add_common_handlers(app, refused)
    app.add_exception_handler(FtError, _typed)
    app.add_exception_handler(SQLAlchemyError, _without_ledger)


def refused(error: RequestError, trace_id: str, path: str) -> JSONResponse:
    """The answer to a refused request."""
    said = {"error_code": error.error_code, "message": error.what, "where": error.where or error.field}
    content = {"status": "error", **said, "mend": error.mend, "trace_id": trace_id}
    content = {name: text.encode("utf-8", "replace").decode() for name, text in content.items()}  # callers' own words
    return JSONResponse(content, status_code=error.status, headers=refusal_headers(error))


async def _typed(request: Request, error: Exception) -> Response:
    assert isinstance(error, FtError)
    status = STATUSES.get(error.code, 500)
    return _answer(request, RequestError(error.code, error.what, status=status, mend=error.mend, field=error.where))


async def _without_ledger(request: Request, error: Exception) -> Response:
    logger.warning("the ledger failed trace=%s: %s", request.state.trace_id, type(error).__name__)
    told = RequestError("log_unavailable", "the ledger cannot be reached", status=503, mend="Try again later.")
    return _answer(request, told)


def _answer(request: Request, error: RequestError) -> Response:
    request.state.outcome = error.error_code
    return refused(error, request.state.trace_id, request.url.path)
