"""A report whose parts contradict each other is no evidence: it was put together wrongly or changed afterwards."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain

import numpy as np

from ft_assets.evaluation.report import EvalReport, Paired, Slice
from ft_assets.evaluation.statistics import ece, overall_figures
from ft_resources.errors import EvaluationError

CLOSE = 1e-6


def require_consistent(report: EvalReport) -> None:
    """Refuse a report whose counts, shares and figures cannot all be true.

    A figure that is NaN contradicts nothing; the gates refuse it by themselves.

    Raises:
        EvaluationError: Every contradiction found.
    """
    found = list(
        chain(_counts(report), _figures(report), _champion(report), _slices(report), _labels(report), _rest(report))
    )
    if found:
        raise EvaluationError(
            "the report contradicts itself: " + "; ".join(found),
            where=f"report of {report.task}, adapter {report.adapter[:12]}",
            mend="Evaluate the adapter again.",
        )


def _counts(report: EvalReport) -> Iterator[str]:
    k = len(report.labels)
    if len(set(report.labels)) != k:
        yield "a label is listed twice"
    if len(report.confusion) != k or any(len(row) != k for row in report.confusion):
        yield f"the confusion matrix is not {k} x {k}"
        return
    if min((cell for row in report.confusion for cell in row), default=0) < 0:
        yield "the confusion matrix holds a negative count"
    if report.rows != _total(report):
        yield f"the confusion matrix counts {_total(report)} rows of {report.rows}"


def _figures(report: EvalReport) -> Iterator[str]:
    for name, figures in report.models.items():
        for metric, each in figures.items():
            if min(each.value, each.low, each.high) < -CLOSE or max(each.value, each.low, each.high) > 1 + CLOSE:
                yield f"{metric} of {name} lies outside 0..1"
            if each.low > each.high + CLOSE:
                yield f"the interval of {metric} of {name} ends before it begins"
    if report.rows and _square(report):
        counted = overall_figures(np.array(report.confusion))
        for metric, each in report.models.get("candidate", {}).items():
            if metric in counted and abs(each.value - float(counted[metric])) > CLOSE:
                yield f"{metric} is {each.value:.4f}, by the confusion matrix {float(counted[metric]):.4f}"


def _champion(report: EvalReport) -> Iterator[str]:
    if report.champion is None:
        if report.paired or report.retained or "champion" in report.models:
            yield "figures of a champion, but none is named"
        return
    for name, pair in (("paired", report.paired), ("retained", report.retained)):
        if pair is not None:
            yield from _pair(name, pair, report.rows)
    if report.paired is None:
        return
    if report.paired.rows != report.rows:
        yield f"champion and candidate were compared on {report.paired.rows} rows of {report.rows}"
    ours, theirs = (report.models.get(name, {}).get("accuracy") for name in ("candidate", "champion"))
    if ours and theirs and report.rows:
        lead = (report.paired.only_candidate_right - report.paired.only_champion_right) / report.rows
        if abs(ours.value - theirs.value - lead) > CLOSE:
            yield f"the accuracies differ by {ours.value - theirs.value:+.4f}, the paired answers by {lead:+.4f}"
    if report.retained is not None and (
        report.retained.rows > report.paired.rows
        or report.retained.only_candidate_right > report.paired.only_candidate_right
        or report.retained.only_champion_right > report.paired.only_champion_right
    ):
        yield "the retained rows count more than all rows"


def _pair(name: str, pair: Paired, rows: int) -> Iterator[str]:
    parts = (pair.only_candidate_right, pair.only_champion_right)
    if min(pair.rows, *parts) < 0 or sum(parts) > pair.rows or pair.rows > rows:
        yield f"the counts of '{name}' exceed its rows"


def _slices(report: EvalReport) -> Iterator[str]:
    rows: dict[str, int] = defaultdict(int)
    right: dict[str, int] = defaultdict(int)
    seen = set()
    for each in report.slices:
        if (each.name, each.value) in seen:
            yield f"the slice {each.title} is listed twice"
        seen.add((each.name, each.value))
        rows[each.name] += each.rows
        right[each.name] += each.candidate_right
        if not _slice_fits(each) or each.rows > report.rows:
            yield f"the counts of the slice {each.title} contradict each other"
        if report.champion is None and each.champion_right is not None:
            yield f"the slice {each.title} counts a champion, but none is named"
    hits = sum(report.confusion[at][at] for at in range(len(report.labels))) if _square(report) else report.rows
    for name, counted in rows.items():
        if counted > report.rows or right[name] > hits:
            yield f"the slices by {name} count more than all rows"


def _slice_fits(each: Slice) -> bool:
    if not 0 <= each.candidate_right <= each.rows or each.rows == 0:
        return False
    theirs, won, lost = each.champion_right, each.only_candidate_right, each.only_champion_right
    if theirs is None or won is None or lost is None:
        return theirs is None and won is None and lost is None
    return (
        0 <= theirs <= each.rows
        and 0 <= won <= each.rows - theirs
        and 0 <= lost <= each.rows - each.candidate_right
        and each.candidate_right - theirs == won - lost
    )


def _labels(report: EvalReport) -> Iterator[str]:
    if set(report.per_label) - set(report.labels):
        yield "figures of labels that the task does not have"
    if not _square(report):
        return
    for at, label in enumerate(report.labels):
        figures = report.per_label.get(label)
        if figures is not None and figures.support != sum(report.confusion[at]):
            yield f"label {label} has support {figures.support}, by the confusion matrix {sum(report.confusion[at])}"


def _rest(report: EvalReport) -> Iterator[str]:
    bins = report.calibration.bins
    counted = sum(each.count for each in bins)
    if bins and counted != report.rows:
        yield f"the reliability bins count {counted} rows of {report.rows}"
    if counted and abs(report.calibration.ece - ece(bins)) > CLOSE:
        yield f"the calibration error is {report.calibration.ece:.4f}, by its bins {ece(bins):.4f}"
    serving = report.serving
    if serving is not None and (serving.rows < 0 or serving.agreement < 0 or serving.agreement > 1):
        yield "the serving engine agrees on fewer than no rows or on more than all"
    if report.latency.requests < 0 or report.latency.p50_ms > report.latency.p95_ms:
        yield "the latency percentiles are out of order"


def _square(report: EvalReport) -> bool:
    k = len(report.labels)
    return len(report.confusion) == k and all(len(row) == k for row in report.confusion)


def _total(report: EvalReport) -> int:
    return sum(map(sum, report.confusion))
