"""The small task that the tests of the graph run on."""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ft_assets.platform import Platform
from ft_resources.environments import Environment

TASK = "small-mail"
TASK_FILE = """
name: small-mail
type: text-classification
description: A few hundred real mails.
labels: [ham, spam]
recipe: encoder-lora@1
overrides:
  base: {max_tokens: 48}
  lora: {rank: 4, alpha: 8}
  training: {epochs: 1, precision: fp32}
sources:
  - {kind: files, url: rows.jsonl, event_time: at}
  - {kind: feedback}
cleaning: {max_chars: 400}
gates:
  thresholds: {accuracy: 0.7}
  latency_p95_ms: 5000
  max_calibration_error: 0.4
  non_inferiority_margin: 0.1
  forgetting_margin: 0.1
monitoring:
  window_days: 3
  min_rows: 40
  retrain: {min_new_labels: 40, cooldown_days: 0}
"""


@dataclass(frozen=True)
class Built:
    """A home whose task is live."""

    home: Path
    copy: Path
    """The home without its Dagster instance, as it was when the run ended: nobody opens it."""
    run_id: str
    """Of the run that made it so."""


def open_home(home: Path) -> Platform:
    """The platform at `home`, reading the task files of that home alone."""
    return Platform(Environment.read({"FT_TASKS": str(home / "tasks"), "FT_ACTOR": "tester"}, home=home))


def write_task(folder: Path, text: str = TASK_FILE, rows: pd.DataFrame | None = None) -> Path:
    """A task file in `folder`, with its rows beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if rows is not None:
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as sink:
            for row in rows.itertuples():
                sink.write(json.dumps({"text": row.text, "label": row.label, "at": row.event_time.isoformat()}) + "\n")
    path = folder / "small-mail.yaml"
    path.write_text(text, encoding="utf-8")
    return path
