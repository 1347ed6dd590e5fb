"""A report of written answers whose parts contradict each other is no evidence."""

import math
from collections.abc import Iterator
from itertools import chain

from ft_assets.evaluation.consistency import CLOSE
from ft_assets.evaluation.generation.metrics import METRICS, SCORE
from ft_assets.evaluation.generation.paired import Gain
from ft_assets.evaluation.generation.report import FieldFigures, GenerationReport
from ft_resources.errors import EvaluationError


def require_consistent(report: GenerationReport) -> None:
    """Refuse a report whose counts, scores and figures cannot all be true.

    A figure that is NaN contradicts nothing; the gates refuse it by themselves.

    Raises:
        EvaluationError: Every contradiction found.
    """
    found = list(chain(_counts(report), _figures(report), _gains(report), _slices(report), _fields(report)))
    if found:
        raise EvaluationError(
            "the report contradicts itself: " + "; ".join(found),
            where=f"report of {report.task}, adapter {report.adapter[:12]}",
            mend="Evaluate the adapter again.",
        )


def _counts(report: GenerationReport) -> Iterator[str]:
    if not 0 <= report.rows <= report.test_rows:
        yield f"{report.rows} rows were answered of {report.test_rows}"
    if report.cut < 0 or report.unanswered < 0 or report.cut + report.unanswered > report.rows:
        yield "more answers were cut or not given than there are rows"
    if report.score != SCORE[report.type]:
        yield f"answers of type {report.type} are compared by {SCORE[report.type]}, not by {report.score}"
    wanted = {"candidate", "base", *(["champion"] if report.champion else [])}
    if set(report.models) != wanted:
        yield f"figures of {', '.join(report.models)}, where {', '.join(sorted(wanted))} were to be compared"
    if bool(report.fields) != (report.type == "extraction"):
        yield "fields are declared by an extraction, and by nothing else"
    serving = report.serving
    if min(serving.rows, serving.tokens) < 0 or not _shares(serving.same, serving.agreement):
        yield "the serving engine agrees on fewer than no tokens or on more than all"
    if serving.same > serving.agreement + CLOSE:
        yield "more tokens are the same than agree"
    latency = report.latency
    if latency.requests < 0 or latency.first_token_p50_ms > latency.first_token_p95_ms:
        yield "the latency percentiles are out of order"


def _figures(report: GenerationReport) -> Iterator[str]:
    for name, figures in report.models.items():
        for metric, each in figures.items():
            if metric not in METRICS or report.type not in METRICS[metric].kinds:
                yield f"{metric} of {name} is no figure of type {report.type}"
                continue
            top = 1 + CLOSE if METRICS[metric].direction == "higher" else math.inf
            if min(each.value, each.low, each.high) < -CLOSE or max(each.value, each.low, each.high) > top:
                yield f"{metric} of {name} lies outside its range"
            if each.low > each.high + CLOSE:
                yield f"the interval of {metric} of {name} ends before it begins"


def _gains(report: GenerationReport) -> Iterator[str]:
    if (report.champion is None) != (report.paired is None) or (report.paired is None) != (report.retained is None):
        yield "candidate and champion were to be compared, or there is none"
    for other, gain in (("base", report.over_base), ("champion", report.paired)):
        if gain is None:
            continue
        yield from _gain(f"gain over the {other}", gain, report.rows)
        if gain.rows != report.rows:
            yield f"candidate and {other} were compared on {gain.rows} rows of {report.rows}"
        ours, theirs = (report.models.get(name, {}).get(report.score) for name in ("candidate", other))
        if ours and theirs and abs(ours.value - theirs.value - gain.mean) > CLOSE:
            yield f"{report.score} differs from the {other} by {ours.value - theirs.value:+.4f}, row by row by " + (
                f"{gain.mean:+.4f}"
            )
    if report.retained is not None:
        yield from _gain("gain on retained rows", report.retained, report.rows)


def _gain(name: str, gain: Gain, rows: int) -> Iterator[str]:
    if not 0 <= gain.rows <= rows:
        yield f"the {name} is of {gain.rows} rows of {rows}"
    if gain.mean**2 > gain.mean_square + CLOSE or gain.mean_square > 1 + CLOSE:
        yield f"the {name} has a mean and a mean square that no scores have"


def _slices(report: GenerationReport) -> Iterator[str]:
    seen = set()
    totals: dict[str, int] = {}
    for each in report.slices:
        if (each.name, each.value) in seen:
            yield f"the slice {each.title} is listed twice"
        seen.add((each.name, each.value))
        totals[each.name] = totals.get(each.name, 0) + (0 if each.name == "field" else each.rows)
        if not 0 < each.rows <= report.rows or not _shares(each.candidate, each.champion or 0.0):
            yield f"the slice {each.title} has scores outside 0..1 or more rows than there are"
        if (each.gain is None) != (each.champion is None) or (report.champion is None and each.gain is not None):
            yield f"the slice {each.title} and the report do not agree on whether there is a champion"
        if each.gain is not None and each.champion is not None:
            yield from _gain(f"gain of the slice {each.title}", each.gain, each.rows)
            if each.gain.rows != each.rows or abs(each.candidate - each.champion - each.gain.mean) > CLOSE:
                yield f"the slice {each.title} has another gain than its scores"
    for name, rows in totals.items():
        if rows > report.rows:
            yield f"the slices by {name} count more than all rows"


def _fields(report: GenerationReport) -> Iterator[str]:
    if set(report.per_field) != set(report.fields):
        yield "figures of other fields than the declared ones"
    for name, each in report.per_field.items():
        if not _fits(each, report.rows):
            yield f"the counts of the field {name} contradict its figures"
    total = [sum(getattr(one, part) for one in report.per_field.values()) for part in _PARTS]
    told = report.models.get("candidate", {}).get("field_f1")
    if told is not None and report.per_field:
        counted = 2 * total[0] / (2 * total[0] + total[1] + total[2]) if sum(total) else 0.0
        if abs(told.value - counted) > CLOSE:
            yield f"field_f1 is {told.value:.4f}, by the fields {counted:.4f}"


_PARTS = ("true_positives", "false_positives", "false_negatives")


def _fits(each: FieldFigures, rows: int) -> bool:
    true, false, missed = (getattr(each, part) for part in _PARTS)
    if min(true, false, missed) < 0 or true + max(false, missed) > rows:
        return False
    wanted = (
        true / (true + false) if true + false else 0.0,
        true / (true + missed) if true + missed else 0.0,
        2 * true / (2 * true + false + missed) if true + false + missed else 0.0,
    )
    return all(
        abs(one - other) <= CLOSE for one, other in zip((each.precision, each.recall, each.f1), wanted, strict=True)
    )


def _shares(*values: float) -> bool:
    return not any(value < 0 or value > 1 + CLOSE for value in values)
