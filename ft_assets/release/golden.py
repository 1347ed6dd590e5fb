"""What a freshly started service is asked: golden requests, answered as evaluated, and the samples of the task file."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ft_assets.evaluation.generation.report import GenerationReport
from ft_assets.evaluation.stored import parse_report
from ft_assets.release.samples import SampleRequest
from ft_resources.errors import ServiceError
from ft_resources.lake import Artefact
from ft_resources.serving import ServerProcess

PER_LABEL = 5
FIRM = 0.6
"""Answers below this confidence may differ by rounding between two batches; they are not asked."""
CONFIDENCE_SLACK = 0.02
LONGEST = 120
"""Characters of a text that are shown in a sentence."""
MOST = 10
"""Wrong answers that are told one by one; all of them are in the check's table."""


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


def ask_samples(server: ServerProcess, task: str, samples: Sequence[SampleRequest]) -> list[dict[str, Any]]:
    """Every sample request of the task file, asked one at a time, beside what was expected.

    Raises:
        ServiceError: The service did not answer; it names the text.
    """
    return [_asked_sample(server, task, sample) for sample in samples]


def complaints(service: Mapping[str, Any]) -> list[str]:
    """What a built service (`service.json`) answered wrongly, one sentence each; empty when it may be released."""
    asked = service["golden"]
    told = [] if asked else ["no golden request was asked"]
    for one in wrong(asked):
        sure = f" ({one['confidence']:.2f})", f" ({one['expected_confidence']:.2f})"
        told.append(
            f"golden request {one['row_id']}: answered {_shown(one['answered'])}{sure[0]}, "
            f"evaluated was {_shown(one['expected'])}{sure[1]}"
        )
    for one in service.get("test_requests", []):
        if not one["right"]:
            told.append(
                f"test request {_shown(one['text'])}: answered {_shown(one['answered'])}, expected {one['expected']}"
            )
    return told if len(told) <= MOST else [*told[:MOST], f"and {len(told) - MOST} more"]


def mend(service: Mapping[str, Any]) -> str:
    """What to do about the complaints."""
    if wrong(service["golden"]) or not service["golden"]:
        return "Materialise eval_report, model_version, bento_service and release of this task in one run."
    return (
        "Correct serving.test_requests in the task file or train an adapter that answers so, then materialise "
        "bento_service and release in one run."
    )


def listed(samples: Sequence[SampleRequest]) -> list[dict[str, Any]]:
    """The sample requests as a Bento's manifest keeps them."""
    return [sample.model_dump(mode="json") for sample in samples]


def _shown(text: str) -> str:
    return repr(text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...")


def _asked_sample(server: ServerProcess, task: str, sample: SampleRequest) -> dict[str, Any]:
    try:
        got = server.ask("/predict", {"task": task, "inputs": [sample.text]}, timeout=300)["results"][0]
    except ServiceError as error:
        raise ServiceError(
            f"test request {_shown(sample.text)}: {error.what}",
            where=f"serving.test_requests of task {task}",
            mend="Write a text that the service takes, or drop it.",
        ) from error
    answered = got["label"] if sample.label is not None else got["text"]
    return {
        "text": sample.text,
        "expected": sample.expected,
        "answered": answered,
        "right": sample.met_by(answered),
        "confidence": got["confidence"],
    }


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
