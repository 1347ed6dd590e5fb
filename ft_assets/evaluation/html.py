"""The report as one HTML page without anything outside it: readable in an archive, in a mail and on a phone."""

import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from ft_assets.evaluation.decision import Decision
from ft_assets.evaluation.report import EvalReport
from ft_assets.evaluation.statistics import Interval

if TYPE_CHECKING:
    import jinja2

Models = Mapping[str, Mapping[str, Interval]]
MOST_HEAT_LABELS = 12
MOST_ROWS = 20
MOST_CHARS = 400
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
"""Characters with which a text could reorder or hide what stands around it, or break the encoding."""


class Earlier(NamedTuple):
    """The accuracy of an adapter evaluated before, oldest first in a history."""

    when: str
    adapter: str
    accuracy: float


def render(
    report: EvalReport, decision: Decision, predictions: pd.DataFrame, history: Sequence[Earlier] | None = None
) -> str:
    """The page as UTF-8 text; every value in it is escaped and the page forbids itself scripts and the network.

    Args:
        predictions: As `report.build_report` takes them; the texts of mistakes and changed answers are shown.
        history: Earlier adapters, oldest first; fewer than two are not drawn.
    """
    template = page("page.html")
    wrong = predictions[predictions["candidate_label"] != predictions["label"]]
    changed = predictions.iloc[:0]
    if report.champion is not None:
        changed = predictions[predictions["candidate_label"] != predictions["champion_label"]]
    return template.render(
        report=report,
        decision=decision,
        models=[name for name in ("candidate", "champion", "majority", "linear") if name in report.models],
        metrics=list(dict.fromkeys(metric for figures in report.models.values() for metric in figures)),
        level=level(report.models),
        gains=gains(report.models),
        heat=_heat(report),
        confused=_confused(report),
        dots=_dots(report),
        history=_history(history or ()),
        mistakes=_rows(wrong.sort_values(["candidate_confidence", "row_id"], ascending=[False, True])),
        mistakes_in_all=len(wrong),
        changed=_rows(_losses_first(changed)),
        changed_in_all=len(changed),
    )


def page(name: str) -> "jinja2.Template":
    """A page of this package; every value that it shows is escaped."""
    import jinja2

    folder = files(__package__)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FunctionLoader(lambda wanted: folder.joinpath(wanted).read_text(encoding="utf-8")),
    )
    environment.filters["figure"] = _figure
    return environment.get_template(name)


def _figure(value: float, digits: int = 3) -> str:
    return "not measured" if math.isnan(value) else f"{value:.{digits}f}"


def level(models: Models) -> str:
    """Confidence of the intervals, for people."""
    levels = {each.confidence for figures in models.values() for each in figures.values()}
    return " / ".join(f"{100 * level:g} %" for level in sorted(levels))


def gains(models: Models) -> dict[str, float]:
    """How far the candidate lies above the champion, by metric."""
    ours, theirs = (models.get(name, {}) for name in ("candidate", "champion"))
    found = {metric: each.value - theirs[metric].value for metric, each in ours.items() if metric in theirs}
    return {metric: gain for metric, gain in found.items() if not math.isnan(gain)}


def _heat(report: EvalReport) -> list[list[int]] | None:
    """Shade of each cell in percent, or None where a matrix would not fit on the page."""
    if len(report.labels) > MOST_HEAT_LABELS:
        return None
    counts = np.array(report.confusion, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.rint(60 * np.sqrt(shares)).astype(int).tolist()


def _confused(report: EvalReport) -> list[tuple[str, str, int]]:
    cells = [
        (true, answered, report.confusion[row][column])
        for row, true in enumerate(report.labels)
        for column, answered in enumerate(report.labels)
        if row != column and report.confusion[row][column]
    ]
    return sorted(cells, key=lambda cell: (-cell[2], cell[0], cell[1]))[:MOST_ROWS]


def _dots(report: EvalReport) -> list[dict[str, Any]]:
    bins = [each for each in report.calibration.bins if not math.isnan(each.confidence + each.accuracy)]
    most = max((each.count for each in bins), default=1)
    return [
        {
            "x": round(40 + 250 * each.confidence, 1),
            "y": round(215 - 200 * each.accuracy, 1),
            "r": round(3 + 6 * math.sqrt(each.count / most), 1),
            "title": f"{each.count} rows, confidence {each.confidence:.3f}, right {each.accuracy:.3f}",
        }
        for each in bins
    ]


def _history(history: Sequence[Earlier]) -> dict[str, Any] | None:
    points = [each for each in history if not math.isnan(each.accuracy)]
    if len(points) < 2:
        return None
    low, high = min(each.accuracy for each in points), max(each.accuracy for each in points)
    low, high = max(0.0, low - 0.02), min(1.0, high + 0.02)

    def height(value: float) -> float:
        return round(125 - 110 * (value - low) / (high - low), 1)

    return {
        "dots": [
            {
                "x": round(50 + 830 * at / (len(points) - 1), 1),
                "y": height(each.accuracy),
                "title": f"{each.when}: {each.adapter[:12]}, {each.accuracy:.3f}",
            }
            for at, each in enumerate(points)
        ],
        "marks": [{"y": height(value), "title": f"{value:.2f}"} for value in (low, (low + high) / 2, high)],
        "first": points[0].when,
        "last": points[-1].when,
    }


def _losses_first(changed: pd.DataFrame) -> pd.DataFrame:
    if changed.empty:
        return changed
    right = changed["candidate_label"] == changed["label"]
    was_right = changed["champion_label"] == changed["label"]
    order = np.where(was_right, 0, np.where(right, 1, 2))
    keyed = changed.assign(_order=order, _sure=-changed["candidate_confidence"])
    return keyed.sort_values(["_order", "_sure", "row_id"])


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {
            "row_id": row["row_id"],
            "text": snippet(row["text"]),
            "label": snippet(row["label"]),
            "candidate": row["candidate_label"],
            "confidence": float(row["candidate_confidence"]),
            "right": row["candidate_label"] == row["label"],
            "champion": snippet(str(row.get("champion_label", ""))),
        }
        for row in frame.head(MOST_ROWS).to_dict("records")
    ]


def snippet(text: str) -> str:
    """The start of `text`, without characters that could reorder or hide what stands around it."""
    cut = text if len(text) <= MOST_CHARS else text[:MOST_CHARS].rstrip() + " …"
    return UNSAFE.sub("\N{REPLACEMENT CHARACTER}", re.sub(r"\s*\n\s*", "\n", cut)).strip()
