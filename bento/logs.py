"""Logs that machines read: one JSON object per line, one line per request, never an input, a key or a header."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

requests = logging.getLogger("bento.requests")


class JsonLines(logging.Formatter):
    """A record as one JSON object; what was given as `extra={"fields": ...}` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def use_json() -> None:
    """Let everything this process logs come as JSON lines on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in (None, "bentoml", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    requests.setLevel(logging.INFO)
