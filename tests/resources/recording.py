"""What tests record in a ledger."""

from datetime import UTC, datetime, timedelta
from typing import Any

from ft_resources.ledger import Ledger

TASK = "mail-triage"
NOON = datetime(2002, 8, 1, 12, tzinfo=UTC)


def release(ledger: Ledger, adapter: str, expected_live: str | None = None, **other: Any) -> dict[str, Any]:
    decision = {
        "task": TASK,
        "kind": "release",
        "adapter": adapter,
        "base": "package:base/model",
        "report": "r" * 64,
        "model_version": "1",
        "bento": "ft-mail-triage:abc",
        "actor": "ada",
        "because": "all gates passed",
        "decision": {"passed": True, "gates": [{"name": "calibrated", "ece": 0.03}]},
        **other,
    }
    return ledger.record_release(expected_live=expected_live, **decision)


def answer(ledger: Ledger, name: str, event_time: datetime = NOON, **other: Any) -> None:
    ledger.log_predictions(
        [
            {
                "id": name,
                "task": TASK,
                "release_id": "rel-1",
                "adapter": "a" * 64,
                "model_version": "1",
                "input": f"the text of {name} – naïve",
                "label": "ham",
                "confidence": 0.75,
                "probabilities": {"ham": 0.75, "spam": 0.25},
                "embedding": b"\x00\x3c\xff",
                "caller": None,
                "trace_id": "t" * 32,
                "latency_ms": 3.5,
                "event_time": event_time,
                "answered_at": event_time + timedelta(seconds=1),
                **other,
            }
        ]
    )


def say(ledger: Ledger, name: str, label: str | None, rating: int | None = None, author: str = "ada") -> bool:
    return ledger.add_feedback(prediction_id=name, label=label, rating=rating, author=author)
