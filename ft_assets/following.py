"""Following a Dagster run as lines for people: what was made, which checks passed, what failed and why."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import dagster as dg

HEADLINES = (
    "reused",
    "rows",
    "kept",
    "rejected",
    "trials",
    "validation_accuracy",
    "accuracy",
    "macro_f1",
    "token_f1",
    "field_accuracy",
    "champion",
    "version",
    "bento",
    "release",
    "requests",
    "labelled",
    "verdict",
)


Kind = Literal["made", "passed", "refused", "warned", "failed", "note"]


@dataclass(frozen=True)
class Line:
    """One thing that happened in a run."""

    kind: Kind
    subject: str
    text: str
    seconds: float
    """Since the run's first event."""


class Follower:
    """Reads the events of one run from the instance, each once."""

    def __init__(self, instance: dg.DagsterInstance, run_id: str) -> None:
        self._instance, self._run_id = instance, run_id
        self._cursor: str | None = None
        self._first: float | None = None
        self._told_why = False

    def lines(self) -> Iterator[Line]:
        """Lines of the events since the last call."""
        while True:
            batch = self._instance.get_records_for_run(self._run_id, cursor=self._cursor, limit=500)
            for record in batch.records:
                line = self._line(record.event_log_entry)
                if line is not None:
                    self._told_why = self._told_why or line.kind in ("refused", "failed")
                    yield line
            self._cursor = batch.cursor
            if not batch.has_more:
                return

    def _line(self, entry: Any) -> Line | None:
        self._first = self._first or entry.timestamp
        seconds = entry.timestamp - self._first
        event = entry.dagster_event
        if event is None:
            note = entry.level in (logging.INFO, logging.WARNING) and not entry.user_message.startswith("[pipes]")
            return Line("note", entry.step_key or "", entry.user_message, seconds) if note else None
        kind = event.event_type_value
        if kind == "ASSET_MATERIALIZATION":
            made = event.event_specific_data.materialization
            return Line("made", made.asset_key.to_user_string(), _headline(made.metadata), seconds)
        if kind == "ASSET_CHECK_EVALUATION":
            check = event.event_specific_data
            informs = check.severity == dg.AssetCheckSeverity.WARN
            verdict: Kind = "passed" if check.passed else "warned" if informs else "refused"
            return Line(
                verdict, f"{check.asset_key.to_user_string()}.{check.check_name}", check.description or "", seconds
            )
        if kind == "STEP_FAILURE":
            data = event.event_specific_data
            failure = data.user_failure_data
            if data.error and data.error.cls_name == "DagsterAssetCheckFailedError":
                return None  # the check's own line has said why
            text = failure.description if failure else _cause(data.error)
            return Line("failed", event.step_key or "", str(text).strip(), seconds)
        if kind == "PIPELINE_FAILURE" and not self._told_why:
            return Line("failed", "", event.message, seconds)
        if kind == "STEP_UP_FOR_RETRY":
            cause = _cause(event.event_specific_data.error)
            return Line("note", event.step_key or "", f"the step failed and is tried again: {cause}", seconds)
        return None


@contextmanager
def following(instance: dg.DagsterInstance, run_id: str, show: Callable[[Line], None]) -> Iterator[None]:
    """Show the lines of a run while the body executes it in this process."""
    follower, over = Follower(instance, run_id), threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            for line in follower.lines():
                show(line)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for line in follower.lines():
            show(line)


def _cause(error: Any) -> str:
    """What first went wrong: the policy that tries a step again wraps it."""
    while error is not None and error.cause is not None:
        error = error.cause
    return error.message.strip().removeprefix("dagster._core.definitions.events.Failure: ") if error else "failed"


def _headline(metadata: Any) -> str:
    parts = []
    for name in HEADLINES:
        if name not in metadata:
            continue
        value = getattr(metadata[name], "value", metadata[name])
        if value is False:
            continue
        parts.append(
            name if value is True else f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        )
    return ", ".join(parts)
