"""OpenTelemetry spans of answered requests, sent by OTLP over HTTP.

A span is made when its request is over, from times that were taken anyway: a service that exports none pays nothing.
The trace id is the one in the answer and in the ledger, so a trace and its predictions find each other.
"""

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bento.phases import Phases

if TYPE_CHECKING:
    from opentelemetry.trace import Span

TRACE = re.compile("[0-9a-f]{32}")
TRACES_PATH = "/v1/traces"


@dataclass(frozen=True)
class Parent:
    """The caller's span, of its `traceparent` header."""

    span_id: int
    sampled: bool


class Tracer:
    """Makes spans and sends them in batches from a thread of its own. Belongs to one event loop.

    Args:
        endpoint: Base URL of an OTLP receiver; `/v1/traces` is added.
        service: The `service.name` of the spans.
    """

    def __init__(self, endpoint: str, service: str = "adapter_service") -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        class Ids(RandomIdGenerator):
            """Gives a root span the trace id that the request has already."""

            trace_id = 0

            def generate_trace_id(self) -> int:
                return self.trace_id

        self._ids = Ids()
        self._provider: TracerProvider = TracerProvider(
            resource=Resource.create({"service.name": service}), id_generator=self._ids
        )
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + TRACES_PATH)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("bento")

    def record(
        self,
        name: str,
        trace_id: str,
        parent: Parent | None,
        start: float,
        end: float,
        attributes: Mapping[str, str | int],
        phases: Phases,
        error: str = "",
    ) -> None:
        """One request: a server span, and a span for each phase below it.

        Args:
            trace_id: As in the answer; one that is not 32 hex digits is hashed, and kept as an attribute.
            start: Monotonic seconds, as `end`.
            error: Its error code; empty when it was answered.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context
        from opentelemetry.trace.status import Status, StatusCode

        offset = time.time_ns() - int(time.monotonic() * 1e9)
        number = trace_number(trace_id)
        self._ids.trace_id = number
        above = Context()  # not the current one: BentoML's own span stands there
        if parent is not None:
            flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
            above = set_span_in_context(NonRecordingSpan(SpanContext(number, parent.span_id, True, flags)))
        span: Span = self._tracer.start_span(
            name,
            above,
            SpanKind.SERVER,
            attributes={**attributes, "ft.trace_id": trace_id},
            start_time=offset + int(start * 1e9),
        )
        inside = set_span_in_context(span)
        for phase in phases.spent:
            part = self._tracer.start_span(phase.name, inside, start_time=offset + int(phase.start * 1e9))
            part.end(offset + int(phase.end * 1e9))
        if error:
            span.set_attribute("error.type", error)
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(offset + int(end * 1e9))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def trace_number(trace_id: str) -> int:
    """The 128-bit trace id of OpenTelemetry for a request's own one."""
    digits = trace_id if TRACE.fullmatch(trace_id) else hashlib.sha256(trace_id.encode()).hexdigest()[:32]
    return int(digits, 16)
