"""What every HTTP request passes first: trace id, key, whole body within the limit, probes."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bento.auth import authorise, is_local
from bento.batcher import Overloaded
from bento.protocol import ErrorResponse
from ft_resources.errors import RequestError

logger = logging.getLogger(__name__)
TRACEPARENT = re.compile(rb"[0-9a-f]{2}-(?P<trace>[0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
TRACE_ID = re.compile(rb"[A-Za-z0-9_-]{8,32}")
PROBES = ("/livez", "/healthz", "/readyz")
MAX_BODY = 32 * 2**20
DRAINED = 8 * MAX_BODY
"""Bytes of a too large body that are read and dropped, so that the caller gets to read the refusal."""
BODY_SECONDS = 60.0


class Front:
    """ASGI middleware around everything, BentoML's own endpoints included.

    Leaves in `scope["state"]`: `trace_id`, `arrived` (monotonic seconds), `local` (the caller may see details).

    Args:
        app: What follows: BentoML with the mounted application.
        own: The mounted application; it answers the probes, which BentoML would otherwise answer itself.
        keys: See `auth.authorise`.
    """

    def __init__(self, app: ASGIApp, own: ASGIApp, keys: Sequence[str]) -> None:
        self._app, self._own, self._keys = app, own, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        client = scope["client"][0] if scope.get("client") else None
        trace_id = read_trace_id(headers)
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state.update(trace_id=trace_id, arrived=time.monotonic(), local=is_local(client, headers))

        async def traced(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-trace-id", trace_id.encode())]
            await send(message)

        probe = scope["path"] in PROBES
        try:
            if not probe:
                authorise(client, headers, self._keys)
                state["local"] = True
            body = await read_body(headers, receive)
        except RequestError as error:
            await error_response(error, trace_id)(scope, receive, traced)
            return
        if body is None:  # the caller went away
            return
        await (self._own if probe else self._app)(scope, replay(body, receive), traced)


def read_trace_id(headers: Mapping[bytes, bytes]) -> str:
    """The caller's trace id (W3C `traceparent`, else `x-trace-id`) when it is valid, else a new one."""
    match = TRACEPARENT.fullmatch(headers.get(b"traceparent", b""))
    if match is not None and match["trace"].strip(b"0"):
        return match["trace"].decode()
    own = headers.get(b"x-trace-id", b"")
    return own.decode() if TRACE_ID.fullmatch(own) else uuid.uuid4().hex


async def read_body(headers: Mapping[bytes, bytes], receive: Receive) -> bytes | None:
    """The whole body; None when the caller went away before its end.

    Raises:
        RequestError: `input_too_large`; `invalid_request` when it does not come to an end in time.
    """
    length = headers.get(b"content-length", b"0")
    too_large = length.isdigit() and int(length) > MAX_BODY
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunk = message.get("body", b"")
                size += len(chunk)
                too_large = too_large or size > MAX_BODY
                if too_large:
                    chunks.clear()
                else:
                    chunks.append(chunk)
                if not message.get("more_body", False) or size > DRAINED:
                    break
    except TimeoutError:
        raise RequestError(
            "invalid_request", f"the body did not arrive within {BODY_SECONDS:g} s", status=408, mend="Send it faster."
        ) from None
    if too_large:
        raise RequestError(
            "input_too_large",
            f"the body is larger than {MAX_BODY // 2**20} MiB",
            status=413,
            mend="Send fewer or shorter inputs.",
        )
    return b"".join(chunks)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first, then what still comes: the disconnect."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def error_response(error: RequestError, trace_id: str) -> JSONResponse:
    """The JSON answer to a refused request."""
    content = ErrorResponse(
        error_code=error.error_code,
        message=_printable(error.what),
        mend=_printable(error.mend),
        trace_id=trace_id,
    )
    headers = {}
    if error.status == 503:
        headers["retry-after"] = str(error.retry_after if isinstance(error, Overloaded) else 1)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(content.model_dump(), status_code=error.status, headers=headers)


def _printable(text: str) -> str:
    """`text` without what UTF-8 cannot carry: callers' own words stand in it."""
    return text.encode("utf-8", "replace").decode()
