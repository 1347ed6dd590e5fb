"""Golden requests: what a freshly started service is asked, and whether it answers as evaluated."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ft_assets.evaluation.generation.report import GenerationReport
from ft_assets.evaluation.stored import parse_report
from ft_resources.lake import Artefact
from ft_resources.serving import ServerProcess

PER_LABEL = 5
FIRM = 0.6
"""Answers below this confidence may differ by rounding between two batches; they are not asked."""
CONFIDENCE_SLACK = 0.02


def ask(server: ServerProcess, task: str, report: Artefact) -> list[dict[str, Any]]:
    """Every golden request of an `eval_report`, asked one at a time, beside what was expected.

    Raises:
        ServiceError: The service did not answer.
    """
    found = parse_report(report)
    if isinstance(found, GenerationReport):
        return [_asked_text(server, task, found, one) for one in report.json("golden.json")]
    rows = _of_labels(report.parquet("predictions.parquet"))
    return [_asked_label(server, task, row) for row in rows.to_dict("records")]


def wrong(answered: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The golden requests whose answer is another one, or is given with another confidence."""
    return [
        one
        for one in answered
        if one["expected"] != one["answered"] or abs(one["expected_confidence"] - one["confidence"]) >= CONFIDENCE_SLACK
    ]


def _asked_label(server: ServerProcess, task: str, row: dict[Any, Any]) -> dict[str, Any]:
    got = server.ask("/predict", {"task": task, "inputs": [row["text"]]})["results"][0]
    return {
        "row_id": row["row_id"],
        "expected": row["candidate_label"],
        "answered": got["label"],
        "expected_confidence": row["candidate_confidence"],
        "confidence": got["confidence"],
    }


def _asked_text(server: ServerProcess, task: str, report: GenerationReport, one: dict[str, Any]) -> dict[str, Any]:
    asked = one["text"] if report.type == "extraction" else json.loads(one["text"])
    got = server.ask("/predict", {"task": task, "inputs": [asked]}, timeout=300)["results"][0]
    return {
        "row_id": one["row_id"],
        "expected": one["expected"],
        "answered": got["text"],
        "expected_confidence": one["expected_confidence"],
        "confidence": got["confidence"],
    }


def _of_labels(predictions: pd.DataFrame) -> pd.DataFrame:
    """Test rows of every answered label, from the surest to the least sure answer that rounding cannot flip."""
    firm = predictions[predictions["candidate_confidence"] > FIRM]
    ordered = (firm if len(firm) else predictions).sort_values(["candidate_confidence", "row_id"])
    groups = [group for _, group in ordered.groupby("candidate_label", sort=True)]
    places = [np.linspace(0, len(group) - 1, min(PER_LABEL, len(group))).astype(int) for group in groups]
    return pd.concat([group.iloc[at] for group, at in zip(groups, places, strict=True)])
