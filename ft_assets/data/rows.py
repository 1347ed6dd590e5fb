"""The form of a raw row."""

import hashlib
from collections.abc import Sequence
from typing import Any

import pandas as pd

ROW_COLUMNS = ["row_id", "text", "label", "source", "event_time", "label_version", "annotator", "origin"]


def row_id(text: str) -> str:
    """The identity of a row: the first 32 hex digits of the SHA-256 of its text."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]


def frame(
    texts: Sequence[str],
    labels: Sequence[str | None],
    sources: Sequence[str],
    event_times: Any,
    origin: str,
) -> pd.DataFrame:
    """Raw rows of one source, in the columns and types of `ROW_COLUMNS`."""
    times = pd.to_datetime(pd.Series(list(event_times), dtype=object), utc=True, errors="coerce", format="ISO8601")
    return pd.DataFrame(
        {
            "row_id": [row_id(text) for text in texts],
            "text": list(texts),
            "label": pd.Series(list(labels), dtype=object),
            "source": list(sources),
            "event_time": times.astype("datetime64[us, UTC]"),
            "label_version": pd.Series([1] * len(texts), dtype="int64"),
            "annotator": ["source"] * len(texts),
            "origin": [origin] * len(texts),
        },
        columns=ROW_COLUMNS,
    )
