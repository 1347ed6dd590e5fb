"""The stored form of a day's answered requests."""

from datetime import UTC, date, datetime, timedelta

import numpy as np
import pandas as pd

COLUMNS = [
    "prediction_id",
    "release_id",
    "adapter",
    "model_version",
    "input",
    "label",
    "confidence",
    "embedding",
    "event_time",
    "answered_at",
    "latency_ms",
    "trace_id",
    "true_label",
    "rating",
    "output",
    "finish_reason",
    "true_text",
]


def day_bounds(day: str) -> tuple[datetime, datetime]:
    """Start and end (exclusive) of an ISO day in UTC."""
    start = datetime.combine(date.fromisoformat(day), datetime.min.time(), UTC)
    return start, start + timedelta(days=1)


def compacted(predictions: pd.DataFrame) -> pd.DataFrame:
    """The columns that monitoring reads, in the order of event time; one row per answered request."""
    frame = predictions.rename(columns={"id": "prediction_id"})[COLUMNS].copy()
    for name in ("true_label", "true_text", "output", "finish_reason"):
        frame[name] = frame[name].astype(object).where(frame[name].notna(), None)
    frame["rating"] = frame["rating"].astype("float64")
    return frame.reset_index(drop=True)


def embeddings(traffic: pd.DataFrame) -> np.ndarray:
    """float32 [rows, hidden] from the logged float16 bytes."""
    return np.stack([np.frombuffer(value, dtype=np.float16) for value in traffic["embedding"]]).astype(np.float32)
