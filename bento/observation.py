"""What is kept of a request once it is over: metrics, spans, and a line in the log."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from bento import logs
from bento.metrics import Subject, metrics
from bento.tracing import Tracer

MODEL_PATHS = frozenset(
    {"/predict", "/explain", "/feedback", "/v1/chat/completions", "/v1/completions", "/v1/embeddings"}
)
UNNAMED = {401: "unauthorized", 403: "forbidden", 404: "invalid_request", 499: "cancelled"}
"""Outcome of an answer that named none, by status."""


class Observer:
    """Looks at requests that are over.

    Args:
        tracer: Exports spans; None: there are none.
        lines: Whether each request is a line in the log.
    """

    def __init__(self, tracer: Tracer | None = None, *, lines: bool = False) -> None:
        self.tracer, self._lines = tracer, lines

    def done(self, method: str, path: str, status: int, state: Mapping[str, Any]) -> None:
        """A request to a known or unknown path is over.

        Args:
            status: The HTTP status; 499 when the caller went away first.
            state: `scope["state"]`, as the front and the handlers left it.
        """
        model = path in MODEL_PATHS
        if not model and not self._lines:
            return
        end = time.monotonic()
        subject: Subject = state.get("subject") or Subject()
        outcome = state.get("outcome") or ("ok" if status < 400 else UNNAMED.get(status, "internal"))
        if model:
            metrics().count(
                subject,
                outcome,
                end - state["arrived"],
                predictions=state.get("predictions", 0),
                tokens=state.get("tokens", (0, 0)),
                phases=state["phases"],
            )
            if self.tracer is not None:
                self._trace(self.tracer, method, path, status, state, subject, outcome, end)
        if self._lines:
            self._log(method, path, status, state, subject, outcome, end)

    @staticmethod
    def _trace(
        tracer: Tracer,
        method: str,
        path: str,
        status: int,
        state: Mapping[str, Any],
        subject: Subject,
        outcome: str,
        end: float,
    ) -> None:
        read, written = state.get("tokens", (0, 0))
        attributes = {
            "http.request.method": method,
            "http.route": path,
            "http.response.status_code": status,
            "ft.task": subject.task,
            "ft.release": subject.release,
            "ft.version": subject.version,
            "ft.adapter": subject.adapter,
            "ft.tokens.input": read,
            "ft.tokens.output": written,
        }
        error = "" if outcome == "ok" else outcome
        tracer.record(
            f"{method} {path}",
            state["trace_id"],
            state["parent"],
            state["arrived"],
            end,
            attributes,
            state["phases"],
            error,
        )

    @staticmethod
    def _log(
        method: str,
        path: str,
        status: int,
        state: Mapping[str, Any],
        subject: Subject,
        outcome: str,
        end: float,
    ) -> None:
        caller = state.get("caller")
        fields = {
            "trace_id": state["trace_id"],
            "method": method,
            "path": path[:200],
            "status": status,
            "outcome": outcome,
            "task": subject.task,
            "release": subject.release,
            "version": subject.version,
            "adapter": subject.adapter,
            "caller": "" if caller is None else caller.name,
            "ms": round((end - state["arrived"]) * 1000, 2),
            **{f"{phase.name}_ms": round((phase.end - phase.start) * 1000, 2) for phase in state["phases"].spent},
        }
        logs.requests.log(logging.INFO, "%s %s %s", method, path[:200], status, extra={"fields": fields})
