"""Intervals and tests on counts: what is known about a figure, given the number of rows it stands on."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
import pydantic
from numpy.typing import ArrayLike, NDArray

from ft_resources.errors import EvaluationError


class Interval(pydantic.BaseModel):
    """A figure and the range it lies in at `confidence`; NaN survives JSON as the string "NaN"."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    value: float
    low: float
    high: float
    confidence: float = 0.95


class Bin(pydantic.BaseModel):
    """Rows whose confidence lies in (low, high]: their number, mean confidence and share answered right."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def confusion_counts(truth: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]) -> NDArray[np.int64]:
    """Counts [labels, labels + 1]: rows by true label, columns by predicted label, last column any other answer.

    Raises:
        EvaluationError: A true label is not in `labels`, or the two lists differ in length.
    """
    if len(truth) != len(predicted):
        raise EvaluationError(f"{len(predicted)} answers for {len(truth)} rows", mend="Score every row once.")
    at = {label: index for index, label in enumerate(labels)}
    unknown = sorted({str(label) for label in truth if label not in at})
    if unknown:
        raise EvaluationError(
            f"true labels {unknown[:5]} are not among the labels of the task",
            mend="Add them to `labels` of the task or correct the rows.",
        )
    k = len(labels)
    rows = np.fromiter((at[label] for label in truth), dtype=np.int64, count=len(truth))
    columns = np.fromiter(
        (k if label is None else at.get(label, k) for label in predicted), dtype=np.int64, count=len(truth)
    )
    return np.bincount(rows * (k + 1) + columns, minlength=k * (k + 1)).reshape(k, k + 1)


def label_figures(confusion: ArrayLike) -> dict[str, NDArray[np.float64]]:
    """Precision, recall, F1 and support of each label; a ratio with nothing below the line is 0.

    Args:
        confusion: Counts [..., labels, columns], columns >= labels, as `confusion_counts` lays them out.

    Returns:
        Four arrays [..., labels].
    """
    counts = np.asarray(confusion, dtype=np.float64)
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    support = counts.sum(axis=-1)
    answered = counts.sum(axis=-2)[..., : counts.shape[-2]]
    return {
        "precision": _ratio(right, answered),
        "recall": _ratio(right, support),
        "f1": _ratio(2 * right, answered + support),
        "support": support,
    }


def overall_figures(confusion: ArrayLike) -> dict[str, NDArray[np.float64]]:
    """Accuracy and unweighted means over labels of precision, recall and F1; arrays [...] for counts [..., k, c]."""
    counts = np.asarray(confusion, dtype=np.float64)
    by_label = label_figures(counts)
    right = np.diagonal(counts, axis1=-2, axis2=-1).sum(axis=-1)
    return {
        "accuracy": _ratio(right, counts.sum(axis=(-2, -1))),
        "macro_precision": by_label["precision"].mean(axis=-1),
        "macro_recall": by_label["recall"].mean(axis=-1),
        "macro_f1": by_label["f1"].mean(axis=-1),
    }


def bootstrap_interval(
    confusion: ArrayLike,
    figures: Callable[[NDArray[np.float64]], Mapping[str, NDArray[np.float64]]] = overall_figures,
    *,
    confidence: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile bootstrap of every figure (Efron and Tibshirani 1993, chapter 13).

    Drawing rows with replacement and counting them is a multinomial draw over the cells of the confusion matrix, so
    no row is ever touched: the cost does not depend on the number of rows.

    Args:
        confusion: Counts [labels, columns].
        figures: From counts [draws, labels, columns] to arrays [draws]; also called with [labels, columns].

    Raises:
        EvaluationError: There are no rows, or `draws` or `confidence` make no interval.
    """
    counts = np.asarray(confusion, dtype=np.int64)
    rows = int(counts.sum())
    if rows <= 0 or (counts < 0).any():
        raise EvaluationError("there are no rows to draw from", mend="Evaluate at least one row.")
    if draws < 1:
        raise EvaluationError(f"{draws} bootstrap draws make no interval", mend="Draw at least once.")
    _check_confidence(confidence)
    cells = np.flatnonzero(counts)
    drawn = np.zeros((draws, counts.size), dtype=np.float64)
    drawn[:, cells] = np.random.default_rng(seed).multinomial(rows, counts.flat[cells] / rows, size=draws)
    tail = (1 - confidence) / 2
    spread = figures(drawn.reshape(draws, *counts.shape))
    values = figures(counts.astype(np.float64))
    intervals = {}
    for name, value in values.items():
        low, high = np.quantile(spread[name], [tail, 1 - tail])
        intervals[name] = Interval(value=float(value), low=float(low), high=float(high), confidence=confidence)
    return intervals


def wilson_interval(right: int, rows: int, confidence: float = 0.95) -> Interval:
    """Two-sided score interval of a share (Wilson 1927, JASA 22:209).

    Raises:
        EvaluationError: There are no rows, or more right than rows.
    """
    _check_counts(rows, right)
    z = _quantile((1 + confidence) / 2, confidence)
    share = right / rows
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    low = 0.0 if right == 0 else max(0.0, middle - half)
    high = 1.0 if right == rows else min(1.0, middle + half)
    return Interval(value=share, low=low, high=high, confidence=confidence)


def mcnemar_exact(only_first: int, only_second: int, *, one_sided: bool = False) -> float:
    """P-value of the exact McNemar test: discordant pairs fall on either side like a fair coin.

    Source: McNemar 1947 (Psychometrika 12:153); exact form as in Fagerland et al. 2013 (BMC Med Res Methodol 13:91).

    Args:
        only_first: Rows that only the first answers right.
        only_second: Rows that only the second answers right.
        one_sided: Test only whether the first is *worse*; small where `only_second` dominates.
    """
    from scipy.special import bdtr

    if only_first < 0 or only_second < 0:
        raise EvaluationError("a count of pairs is negative", mend="Count the rows again.")
    pairs = only_first + only_second
    if pairs == 0:
        return 1.0
    if one_sided:
        return float(bdtr(only_first, pairs, 0.5))
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), pairs, 0.5)))


def paired_difference_interval(
    rows: int, only_first: int, only_second: int, confidence: float = 0.95, *, one_sided: bool = False
) -> Interval:
    """Score interval of accuracy(first) - accuracy(second) on the same rows (Tango 1998, Stat Med 17:891).

    The bounds are the differences that the score test with the restricted maximum-likelihood estimate does not
    reject. Unlike Wald's interval it does not collapse when the two never disagree: on n rows with equal answers the
    one-sided lower bound is -z^2 / (n + z^2).

    Args:
        one_sided: Put the whole error on one side: `low` (and, read alone, `high`) is then a bound at `confidence`.

    Raises:
        EvaluationError: There are no rows, or the counts exceed them.
    """
    _check_counts(rows, only_first, only_second)
    z = _quantile(confidence if one_sided else (1 + confidence) / 2, confidence)

    def score(difference: float) -> float:
        a = 2 * rows
        b = -only_first - only_second + (2 * rows - only_first + only_second) * difference
        c = -only_second * difference * (1 - difference)
        both = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = rows * (2 * both + difference * (1 - difference))
        gap = only_first - only_second - rows * difference
        if variance <= 0:
            return math.copysign(math.inf, gap) if gap else 0.0
        return gap / math.sqrt(variance)

    value = (only_first - only_second) / rows
    return Interval(
        value=value,
        low=_bisect(lambda d: score(d) > z, -1.0, value),
        high=_bisect(lambda d: score(d) >= -z, value, 1.0),
        confidence=confidence,
    )


def rows_for_margin(margin: float, confidence: float) -> int:
    """Fewest rows on which two models that answer alike can be shown to differ by less than `margin` (one-sided)."""
    z = _quantile(confidence, confidence)
    return math.floor(z * z * (1 - margin) / margin) + 1


def reliability_bins(confidence: ArrayLike, right: ArrayLike, bins: int = 10) -> list[Bin]:
    """Rows grouped by confidence into equal-width bins; empty bins are left out.

    Args:
        confidence: Probabilities [rows] of the given answers.
        right: Whether each answer is right, bool [rows].

    Raises:
        EvaluationError: No rows, lengths differ, or a confidence is not within 0..1.
    """
    sure = np.asarray(confidence, dtype=np.float64)
    hit = np.asarray(right, dtype=bool)
    if sure.ndim != 1 or sure.shape != hit.shape or not sure.size:
        raise EvaluationError(f"{sure.size} confidences for {hit.size} answers", mend="Score every row once.")
    if not ((sure >= 0) & (sure <= 1 + 1e-6)).all():
        raise EvaluationError("a confidence is not a number within 0..1", mend="Check the probabilities of the model.")
    at = np.clip(np.ceil(sure * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(at, minlength=bins)
    summed = np.bincount(at, weights=sure, minlength=bins)
    hits = np.bincount(at, weights=hit, minlength=bins)
    return [
        Bin(
            low=i / bins,
            high=(i + 1) / bins,
            count=int(counts[i]),
            confidence=float(summed[i] / counts[i]),
            accuracy=float(hits[i] / counts[i]),
        )
        for i in np.flatnonzero(counts)
    ]


def ece(bins: Sequence[Bin]) -> float:
    """Expected calibration error: |accuracy - confidence| averaged over rows (Naeini et al. 2015, AAAI)."""
    rows = sum(each.count for each in bins)
    if not rows:
        raise EvaluationError("the reliability bins hold no rows", mend="Evaluate at least one row.")
    return sum(each.count * abs(each.accuracy - each.confidence) for each in bins) / rows


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values that keep the chance of any false alarm at the level they are compared with (Holm 1979).

    Valid whatever the dependence between the tests.

    Raises:
        EvaluationError: A p-value is not within 0..1.
    """
    wrong = [name for name, p in p_values.items() if not 0 <= p <= 1]
    if wrong:
        raise EvaluationError(f"the p-values of {wrong} are not within 0..1", mend="Check the counts behind them.")
    adjusted: dict[str, float] = {}
    floor = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = floor
    return {name: adjusted[name] for name in p_values}


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(above, below, out=np.zeros_like(above + below), where=below > 0)


def _quantile(p: float, confidence: float) -> float:
    _check_confidence(confidence)
    return NormalDist().inv_cdf(p)


def _bisect(above: Callable[[float], bool], low: float, high: float) -> float:
    """Where `above`, true on the left, turns false."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) else (low, middle)
    return (low + high) / 2


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise EvaluationError(f"confidence {confidence} is not within 0..1", mend="Use for example 0.95.")


def _check_counts(rows: int, *parts: int) -> None:
    if rows <= 0 or min(parts) < 0 or sum(parts) > rows:
        raise EvaluationError(f"counts {parts} do not fit into {rows} rows", mend="Count the rows again.")
