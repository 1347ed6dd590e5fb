"""What every HTTP request passes first: trace id, caller, limits, whole body, probes; and what is kept of it."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bento.auth import Doorkeeper, permit_path
from bento.bodies import Body, Room
from bento.lifecycle import Drain, drop_timers
from bento.limits import RateLimits
from bento.observation import MODEL_PATHS, Observer
from bento.phases import Phases
from bento.protocol import error_content
from bento.tracing import Parent
from ft_resources.errors import RequestError

logger = logging.getLogger(__name__)
TRACEPARENT = re.compile(rb"[0-9a-f]{2}-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(-.*)?")
TRACE_ID = re.compile(rb"[A-Za-z0-9_-]{8,32}")
TIMEOUT = re.compile(rb"[0-9]{1,9}")
PROBES = ("/livez", "/healthz", "/readyz")
READ_SECONDS = 30.0
"""From a request's deadline to the end of an answer that began in time: what the caller has not read then is lost."""
GONE = 499
CORS_HEADERS = ("authorization", "content-type", "last-event-id", "traceparent", "x-trace-id", "x-timeout-ms")
Answer = Callable[[RequestError, str, str], Response]
"""What is answered for an error, a trace id and a path."""


class Front:
    """ASGI middleware around everything, BentoML's own endpoints included.

    Leaves in `scope["state"]`: `trace_id`, `parent` (the caller's span), `arrived` and `deadline` (monotonic
    seconds), `caller`, `local` (no key is asked for), `phases`. What the handlers leave there is read by
    `observation.Observer`.

    Args:
        app: What follows: BentoML with the mounted application.
        own: The mounted application; it answers the probes, which BentoML would otherwise answer itself.
        doors: Tells who asks.
        limits: How often they may.
        drain: Whether requests are still taken.
        observer: Keeps what is known of a request that is over.
        origins: Sites whose pages may call; `*` for all.
        seconds: Longest time for one request.
        answer: Writes the answer to a refused request.
        pages: Paths of the mounted application that need no key. What is sent to them is not read.
    """

    def __init__(
        self,
        app: ASGIApp,
        own: ASGIApp,
        *,
        doors: Doorkeeper,
        limits: RateLimits,
        drain: Drain,
        observer: Observer,
        origins: Sequence[str] = (),
        seconds: float = 300.0,
        answer: "Answer | None" = None,
        pages: Collection[str] = (),
    ) -> None:
        self._app, self._own, self._doors, self._limits = app, own, doors, limits
        self._drain, self._observer, self._seconds = drain, observer, seconds
        self._answer = answer or error_response
        self._pages = frozenset(pages)
        self._room = Room()
        self._entry: ASGIApp = self._serve
        if origins:
            self._entry = CORSMiddleware(
                self._serve,
                allow_origins=origins,
                allow_methods=["GET", "POST"],
                allow_headers=CORS_HEADERS,
                expose_headers=["x-trace-id", "retry-after"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # nothing here speaks it, and nobody would be asked who they are
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "lifespan" and "app" in scope:  # the first call there is
            drop_timers(scope["app"].middleware_stack)
        await (self._entry if scope["type"] == "http" else self._app)(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        client = scope["client"][0] if scope.get("client") else None
        trace_id, parent = read_trace(headers)
        arrived = time.monotonic()
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state.update(
            trace_id=trace_id,
            parent=parent,
            arrived=arrived,
            local=self._doors.trusts(client, headers),
            phases=Phases(),
        )
        status = GONE

        async def traced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-trace-id", trace_id.encode())]
                if self._drain.draining:
                    more.append((b"connection", b"close"))
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        if scope["path"] in PROBES:
            await self._probe(scope, receive, traced)
            return
        self._drain.in_flight += 1
        body = Body(self._room, headers, receive)
        try:
            await self._admit(scope, receive, traced, client, headers, body)
        except RequestError as error:
            state["outcome"] = error.error_code
            await self._answer(error, trace_id, scope["path"])(scope, receive, traced)
        finally:
            body.drop()
            self._drain.in_flight -= 1
            self._observer.done(scope["method"], scope["path"], status, state)

    async def _probe(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._drain.draining and scope["path"] == "/readyz":
            await JSONResponse({"ready": False}, status_code=503)(scope, receive, send)
        else:
            await self._own(scope, receive, send)

    async def _admit(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        client: str | None,
        headers: Mapping[bytes, bytes],
        body: Body,
    ) -> None:
        """Answer a request that is no probe.

        Raises:
            RequestError: It is refused before its answer began.
        """
        state = scope["state"]
        if self._drain.draining:
            await body.read()  # a connection closed on unread bytes is reset, and the refusal lost
            raise RequestError(
                "not_ready", "the service is shutting down", status=503, mend="Ask another instance.", retry_after=1
            )
        page = scope["path"] in self._pages
        known = self._doors.visitor if page else self._doors.identify
        caller = state["caller"] = known(client, headers)
        self._limits.take(caller)
        permit_path(caller, scope["path"])
        seconds = read_timeout(headers, self._seconds)
        state["deadline"] = state["arrived"] + seconds
        content = b"" if page else await body.read()
        if content is None:  # the caller went away
            return
        started, loop = False, asyncio.get_running_loop()

        async def starting(message: Message) -> None:
            nonlocal started
            if not started:  # an answer that began ends by itself, unless the caller does not read it
                started = True
                limit.reschedule(loop.time() + state["deadline"] - time.monotonic() + READ_SECONDS)
            await send(message)

        try:
            async with asyncio.timeout(state["deadline"] - time.monotonic()) as limit:
                # BentoML's layers add nothing to what the mounted application answers, and cost 0.1 ms
                following = self._own if page or scope["path"] in MODEL_PATHS else self._app
                await following(scope, replay(content, receive), starting)
        except TimeoutError:
            if not started:
                raise deadline_exceeded(seconds) from None
            state["outcome"] = "deadline_exceeded"  # the server closes the connection of an answer that has no end
            logger.warning("the caller did not read the answer within %g s", seconds + READ_SECONDS)


def read_trace(headers: Mapping[bytes, bytes]) -> tuple[str, Parent | None]:
    """The caller's trace id (W3C `traceparent`, else `x-trace-id`) when it is valid, else a new one; and its span."""
    match = TRACEPARENT.fullmatch(headers.get(b"traceparent", b""))
    if match is not None and match["trace"].strip(b"0"):
        span = int(match["span"], 16)
        return match["trace"].decode(), Parent(span, bool(int(match["flags"], 16) & 1)) if span else None
    own = headers.get(b"x-trace-id", b"")
    return own.decode() if TRACE_ID.fullmatch(own) else uuid.uuid4().hex, None


def read_timeout(headers: Mapping[bytes, bytes], most: float) -> float:
    """Seconds the caller is willing to wait (`x-timeout-ms`), at most `most`.

    Raises:
        RequestError: `invalid_request`.
    """
    value = headers.get(b"x-timeout-ms")
    if value is None:
        return most
    if TIMEOUT.fullmatch(value) is None or int(value) == 0:
        raise RequestError(
            "invalid_request", "x-timeout-ms is no number of milliseconds", status=422, mend="Send a whole number."
        )
    return min(most, int(value) / 1000)


def deadline_exceeded(seconds: float) -> RequestError:
    """The answer to a request whose time is over."""
    return RequestError(
        "deadline_exceeded",
        f"there was no answer within {seconds:g} s",
        status=504,
        mend="Send fewer inputs, or allow more time with x-timeout-ms.",
    )


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


def error_response(error: RequestError, trace_id: str, path: str) -> JSONResponse:
    """The JSON answer to a refused request to `path`."""
    content, status = error_content(error, trace_id, path)
    return JSONResponse(content, status_code=status, headers=refusal_headers(error))


def refusal_headers(error: RequestError) -> dict[str, str]:
    """Headers of the answer to a refused request: when to come again, and how to say who one is."""
    headers = {}
    if error.retry_after is not None or error.status == 503:
        headers["retry-after"] = str(error.retry_after or 1)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers
