"""The report of written answers as one HTML page, with prompt, reference and answers side by side."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from bento.conversation import load
from ft_assets.evaluation.decision import Decision
from ft_assets.evaluation.generation.fields import compare, mark
from ft_assets.evaluation.generation.metrics import METRICS, row_counts
from ft_assets.evaluation.generation.report import MODELS, GenerationReport
from ft_assets.evaluation.html import gains, level, page, snippet

MOST_EXAMPLES = 12


class Piece(NamedTuple):
    """A run of an answer's text; `known`: the reference has it in the same place."""

    text: str
    known: bool


def render(report: GenerationReport, decision: Decision, answers: pd.DataFrame) -> str:
    """The page as UTF-8 text; every value in it is escaped and the page forbids itself scripts and the network.

    Args:
        answers: As `report.build_report` takes them.
    """
    scores = row_counts(report.type, answers["candidate_answer"], answers["label"], report.fields)[report.score]
    told = answers.assign(_score=scores.to_numpy())
    changed = told.iloc[:0]
    if report.champion is not None:
        theirs = row_counts(report.type, answers["champion_answer"], answers["label"], report.fields)[report.score]
        gain = told["_score"] - theirs.to_numpy()
        changed = told.assign(_gain=gain)[gain != 0].sort_values(["_gain", "row_id"])
    worst = told.sort_values(["_score", "row_id"])
    shown = [name for name in MODELS if name in report.models]
    rising = {name: gain for name, gain in gains(report.models).items() if METRICS[name].direction == "higher"}
    return page("generation/page.html").render(
        report=report,
        decision=decision,
        models=shown,
        metrics=list(dict.fromkeys(metric for figures in report.models.values() for metric in figures)),
        level=level(report.models),
        gains=rising,
        worst=_examples(worst, report, shown),
        best=_examples(worst.iloc[::-1], report, shown)[:3],
        changed=_examples(changed, report, shown),
        changed_in_all=len(changed),
    )


def _examples(rows: pd.DataFrame, report: GenerationReport, models: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "row_id": row["row_id"],
            "score": row["_score"],
            "prompt": snippet(_asked(row["text"], report)),
            "reference": snippet(row["label"]),
            "answers": {name: _pieces(row[f"{name}_answer"], row["label"]) for name in models},
            "fields": _by_field(row, report, models),
        }
        for row in rows.head(MOST_EXAMPLES).to_dict("records")
    ]


def _asked(text: str, report: GenerationReport) -> str:
    """What the user said last; a document as it is."""
    return text if report.type == "extraction" else load(text)[-1]["content"]


def _pieces(answer: str, reference: str) -> list[Piece]:
    """The start of an answer in runs of words that stand, or don't stand, in the reference too."""
    said, wanted = re.findall(r"\S+\s*|\s+", snippet(answer)), snippet(reference).split()
    matcher = difflib.SequenceMatcher(None, [word.strip() for word in said], wanted, autojunk=False)
    pieces = list[Piece]()
    for tag, start, end, _, _ in matcher.get_opcodes():
        if end > start:
            pieces.append(Piece("".join(said[start:end]), tag == "equal"))
    return pieces


def _by_field(row: Mapping[Any, Any], report: GenerationReport, models: list[str]) -> list[dict[str, Any]]:
    if report.type != "extraction":
        return []
    found = {name: compare(row[f"{name}_answer"], row["label"], report.fields) for name in models}
    return [
        {
            "name": field,
            "expected": _value(found["candidate"].fields[field].expected),
            "models": {
                name: {
                    "value": _value(one.fields[field].answered) if one.valid else "no valid JSON",
                    "mark": mark(one.fields[field]) if one.valid else "wrong",
                }
                for name, one in found.items()
            },
        }
        for field in report.fields
    ]


def _value(value: Any) -> str:
    return "∅" if value is None else snippet(str(value).lower() if isinstance(value, bool) else str(value))
