"""Predictions are in the ledger before their answers go out: one transaction for all answers of a batch."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from bento.conversation import Value
from ft_resources.errors import RequestError
from ft_resources.ledger import Ledger


@dataclass(frozen=True)
class Text:
    """An answer that was generated."""

    output: str
    finish_reason: Literal["stop", "length", "cancelled"]
    """`cancelled`: the caller went away before its end."""
    prompt_tokens: int
    completion_tokens: int
    fields: Mapping[str, Value] | None = None
    """What was extracted; None for other tasks, and where the output does not hold every field."""


@dataclass(frozen=True)
class Prediction:
    """One answered input."""

    prediction_id: str
    task: str
    release_id: str
    model_version: str
    adapter: str
    """Digest, 64 hex digits."""
    input: str
    label: str
    """Empty where the answer is a text."""
    confidence: float
    probabilities: dict[str, float]
    embedding: np.ndarray
    """float16 [hidden]; empty where the answer is a text."""
    user: str | None
    trace_id: str
    latency_ms: float
    """From the arrival of the request to the moment its answer was handed to the log."""
    event_time: datetime
    decision: Literal["accept", "review"] | None = None
    text: Text | None = None

    def row(self, answered_at: datetime) -> dict[str, Any]:
        """The columns of the ledger's `predictions`."""
        return {
            "id": self.prediction_id,
            "task": self.task,
            "release_id": self.release_id,
            "adapter": self.adapter,
            "model_version": self.model_version,
            "input": self.input,
            "label": self.label,
            "confidence": self.confidence,
            "probabilities": self.probabilities,
            "embedding": self.embedding.tobytes(),
            "caller": self.user,
            "trace_id": self.trace_id,
            "latency_ms": self.latency_ms,
            "event_time": self.event_time,
            "answered_at": answered_at,
            "decision": self.decision,
            "output": self.text.output if self.text else None,
            "finish_reason": self.text.finish_reason if self.text else None,
            "prompt_tokens": self.text.prompt_tokens if self.text else None,
            "completion_tokens": self.text.completion_tokens if self.text else None,
        }


class RequestLog:
    """Writes predictions to the ledger. Safe in any number of threads; writers queue."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._turn = threading.Lock()

    def write(self, predictions: Sequence[Prediction]) -> None:
        """Store all of them, durable when this returns.

        Raises:
            RequestError: `log_unavailable`; none of them is stored, so none may be answered.
        """
        at = datetime.now(UTC)
        rows = [prediction.row(at) for prediction in predictions]
        try:
            with self._turn:
                self._ledger.log_predictions(rows)
        except SQLAlchemyError as error:
            raise RequestError(
                "log_unavailable",
                "the answer could not be recorded, so it is not given",
                status=503,
                mend="Try again later; the operator finds the cause in the service's log.",
            ) from error
