"""Turning every kind of error into the one JSON answer of the protocol."""

import logging

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from bento.backend import CallerGone
from bento.front import Answer, error_response
from bento.protocol import ErrorCode, explain
from ft_resources.errors import RequestError

logger = logging.getLogger(__name__)


def add_handlers(app: FastAPI, answer: Answer = error_response) -> None:
    """Let `app` answer every error in one form, by default as `ErrorResponse`."""
    app.state.answer = answer
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(CallerGone, _gone)
    app.add_exception_handler(Exception, _fault)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    if error.status >= 500:
        logger.warning("%s trace=%s %s", error.error_code, request.state.trace_id, error.what)
    request.state.outcome = error.error_code
    answer: Answer = request.app.state.answer
    return answer(error, request.state.trace_id, request.url.path)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    unknown: ErrorCode = "unsupported_parameter" if request.url.path.startswith("/v1/") else "invalid_request"
    return await _refused(request, explain(error.errors(), unknown))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {
        400: "the body is not JSON in UTF-8",
        404: f"there is nothing at {request.url.path[:200]}",
        405: f"{request.method} is not possible at {request.url.path[:200]}",
    }.get(error.status_code, str(error.detail)[:300])
    response = await _refused(
        request,
        RequestError("invalid_request", what, status=error.status_code, mend="The protocol is described at /docs."),
    )
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        response.headers["allow"] = _allowed(request, response.headers.get("allow", ""))
    return response


def _allowed(request: Request, named: str) -> str:
    """The methods of a path: `named` are those of one endpoint there, and others may be documented."""
    documented = request.app.openapi()["paths"].get(request.url.path, {})
    return ", ".join(sorted({*filter(None, named.split(", ")), *(method.upper() for method in documented)}))


async def _fault(request: Request, error: Exception) -> Response:
    logger.error("fault trace=%s", request.state.trace_id, exc_info=error)
    fault = RequestError(
        "internal",
        "the service failed",
        status=500,
        mend="Try again; tell the operator the trace_id if it happens again.",
    )
    return await _refused(request, fault)


async def _gone(request: Request, _: Exception) -> Response:
    request.state.outcome = "cancelled"
    return Response(status_code=499)
