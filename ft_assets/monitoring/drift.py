"""Has the traffic moved away from what the champion was evaluated on? Tests with a stated chance of a false alarm.

Three things are compared: what comes in (embeddings), what goes out (predicted labels) and how sure the model is.
Fixed thresholds on a distance miss real shifts or cry wolf depending on the number of rows; a test does neither.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pydantic
from numpy.typing import NDArray

from ft_assets.evaluation.statistics import Interval, holm, wilson_interval
from ft_resources.errors import DataError, SpecError

CAP = 2000
"""Rows compared on each side, at most: bounds time and memory, and still finds shifts that matter."""
SMALL_EXPECTED = 5.0
"""Below this expected count of a cell the chi-square distribution is not trusted (Cochran 1954)."""
CHUNK = 250
TESTS = ("inputs", "predictions", "confidence")


@dataclass(frozen=True)
class Answers:
    """Answered requests: pooled embeddings float [rows, dimensions], predicted labels and confidences [rows].

    Raises:
        DataError: Lengths differ, or a number is not finite.
    """

    embeddings: NDArray[np.floating]
    labels: Sequence[str]
    confidence: NDArray[np.floating]

    def __post_init__(self) -> None:
        shape = np.shape(self.embeddings)
        if len(shape) != 2 or not shape[0] == len(self.labels) == len(self.confidence):
            raise DataError(
                f"embeddings of shape {shape}, {len(self.labels)} labels and {len(self.confidence)} confidences",
                mend="Pass one of each for every answered request.",
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.integer]) -> "Answers":
        labels = np.asarray(self.labels, dtype=object)
        chosen = Answers(self.embeddings[rows], labels[rows].tolist(), np.asarray(self.confidence)[rows])
        if not np.isfinite(chosen.embeddings).all() or not np.isfinite(chosen.confidence).all():
            raise DataError("an embedding or a confidence is not finite", mend="Check the scoring engine.")
        return chosen


class Reference(Answers):
    """What the champion answered at its evaluation."""


class Window(Answers):
    """What it answered in the days looked at."""


class DriftTest(pydantic.BaseModel):
    """One test: its p-value, the p-value adjusted over the tests of the report (Holm), and how large the shift is."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    method: str
    p_value: float
    adjusted_p: float
    effect_name: str
    effect: float
    alarm: bool


class DriftResult(pydantic.BaseModel):
    """The verdict on one window; `tests` is empty where there are too few rows for a verdict."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    verdict: str
    alarm: bool
    alarmed: list[str]
    reasons: list[str]
    tests: dict[str, DriftTest]
    reference_rows: int
    window_rows: int
    compared_reference_rows: int
    compared_window_rows: int
    alpha: float
    permutations: int
    seed: int


class AccuracyResult(pydantic.BaseModel):
    """Accuracy on the traffic whose labels came back; `accuracy` is None where there are none."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    rows: int
    right: int
    accuracy: Interval | None
    reference_accuracy: float
    drop: float | None
    alarm: bool
    reason: str


def drift(
    reference: Reference,
    window: Window,
    alpha: float = 0.01,
    permutations: int = 999,
    seed: int = 0,
    *,
    min_rows: int = 50,
) -> DriftResult:
    """Compare a window with the reference; the chance that any of the three tests alarms without drift is <= `alpha`.

    Inputs: permutation test of the distance between the mean embeddings. Predictions: chi-square test of the
    predicted labels, by permutation where a cell expects fewer than 5. Confidence: two-sample Kolmogorov-Smirnov.
    Over the three: Holm 1979. Sides larger than 2000 rows are sampled down to that, by `seed`; the result says so.

    Raises:
        DataError: The two sides have embeddings of different length, or numbers that are not finite.
        SpecError: `permutations` are too few to ever reach `alpha`.
    """
    least = math.ceil(len(TESTS) / alpha) - 1
    if permutations < least:
        raise SpecError(
            f"{permutations} permutations cannot show a p-value of {alpha / len(TESTS):.2g}",
            where="monitoring.permutations",
            mend=f"Set at least {least} for alpha {alpha:g}.",
        )
    sizes = {"reference_rows": len(reference), "window_rows": len(window)}
    for side, rows in (("", len(window)), ("reference ", len(reference))):
        if rows < max(min_rows, 2):
            verdict = f"no verdict: {rows} {side}rows of {max(min_rows, 2)} needed"
            return DriftResult(
                verdict=verdict,
                alarm=False,
                alarmed=[],
                reasons=[verdict],
                tests={},
                compared_reference_rows=0,
                compared_window_rows=0,
                **sizes,
                alpha=alpha,
                permutations=permutations,
                seed=seed,
            )
    if reference.embeddings.shape[1] != window.embeddings.shape[1]:
        raise DataError(
            f"embeddings of {reference.embeddings.shape[1]} and {window.embeddings.shape[1]} dimensions",
            mend="Compare answers of one base model only.",
        )
    rng = np.random.default_rng(seed)
    then, now = _sample(reference, rng), _sample(window, rng)
    found = {
        "inputs": _mean_shift(then.embeddings, now.embeddings, permutations, rng),
        "predictions": _label_shift(then.labels, now.labels, permutations, rng),
        "confidence": _confidence_shift(then.confidence, now.confidence),
    }
    adjusted = holm({name: p for name, (_, p, _, _) in found.items()})
    tests = {
        name: DriftTest(
            method=method,
            p_value=p,
            adjusted_p=adjusted[name],
            effect_name=effect_name,
            effect=effect,
            alarm=adjusted[name] <= alpha,
        )
        for name, (method, p, effect_name, effect) in found.items()
    }
    alarmed = [name for name, test in tests.items() if test.alarm]
    reasons = [
        f"Shift in {name}: {test.effect_name} {test.effect:.3f}, adjusted p = {test.adjusted_p:.2g} ({test.method})."
        for name, test in tests.items()
        if test.alarm
    ]
    for side, whole, part in (("reference", reference, then), ("window", window, now)):
        if len(part) < len(whole):
            reasons.append(f"{len(part)} of {len(whole)} {side} rows were compared, drawn at random.")
    return DriftResult(
        verdict=f"drift in {', '.join(alarmed)}" if alarmed else "no drift",
        alarm=bool(alarmed),
        alarmed=alarmed,
        reasons=reasons,
        tests=tests,
        compared_reference_rows=len(then),
        compared_window_rows=len(now),
        **sizes,
        alpha=alpha,
        permutations=permutations,
        seed=seed,
    )


def accuracy_on_labels(
    predicted: Sequence[str],
    truth: Sequence[str | None],
    reference_accuracy: float,
    accuracy_drop: float = 0.1,
    confidence: float = 0.95,
) -> AccuracyResult:
    """Accuracy on answers whose true label came back (others are None), against the accuracy at evaluation.

    Alarms when the loss is larger than `accuracy_drop` and the whole Wilson interval lies below the reference, so
    that neither a small loss nor a handful of unlucky rows alarms.

    Raises:
        DataError: The lists differ in length, or `reference_accuracy` is not within 0..1.
    """
    if len(predicted) != len(truth):
        raise DataError(f"{len(predicted)} answers and {len(truth)} labels", mend="Pass None where no label came back.")
    if not 0 <= reference_accuracy <= 1:
        raise DataError(f"reference accuracy {reference_accuracy} is not within 0..1", mend="Read it from the report.")
    pairs = [(given, true) for given, true in zip(predicted, truth, strict=True) if isinstance(true, str)]
    rows, right = len(pairs), sum(given == true for given, true in pairs)
    if not rows:
        return AccuracyResult(
            rows=0,
            right=0,
            accuracy=None,
            reference_accuracy=reference_accuracy,
            drop=None,
            alarm=False,
            reason="No verdict on accuracy: no labels have come back.",
        )
    accuracy = wilson_interval(right, rows, confidence)
    drop = reference_accuracy - accuracy.value
    alarm = reference_accuracy - accuracy.high > 0 and drop > accuracy_drop + 1e-9
    reason = (
        f"Accuracy on {rows} labelled answers is {accuracy.value:.3f} ({accuracy.low:.3f} to {accuracy.high:.3f}), "
        f"{reference_accuracy:.3f} at evaluation: "
        + ("a loss beyond the limit" if alarm else "no loss beyond both chance and the limit")
        + f" of {accuracy_drop:g}."
    )
    return AccuracyResult(
        rows=rows,
        right=right,
        accuracy=accuracy,
        reference_accuracy=reference_accuracy,
        drop=drop,
        alarm=alarm,
        reason=reason,
    )


def _sample(side: Answers, rng: np.random.Generator) -> Answers:
    rows = np.arange(len(side)) if len(side) <= CAP else np.sort(rng.choice(len(side), CAP, replace=False))
    return side.take(rows)


def _mean_shift(
    then: NDArray[np.floating], now: NDArray[np.floating], permutations: int, rng: np.random.Generator
) -> tuple[str, float, str, float]:
    """Permutation p-value of |mean(now) - mean(then)|, and that distance in units of the spread of `then`.

    With the pooled rows centred, the distance of a relabelling depends on the sum of one side alone, so a block of
    relabellings is one matrix product. The p-value counts the observed labelling itself (Phipson and Smyth 2010).
    """
    pooled = np.concatenate([then, now]).astype(np.float64)
    pooled -= pooled.mean(axis=0)
    rows, first = len(pooled), len(then)
    observed = float((pooled[:first].sum(axis=0) ** 2).sum())
    slack = 1e-9 * max(observed, float((pooled**2).sum()))
    membership = np.zeros((CHUNK, rows))
    membership[:, :first] = 1
    as_large = 0
    for start in range(0, permutations, CHUNK):
        block = rng.permuted(membership[: min(CHUNK, permutations - start)], axis=1)
        as_large += int((((block @ pooled) ** 2).sum(axis=1) >= observed - slack).sum())
    gap = float(np.linalg.norm(pooled[first:].mean(axis=0) - pooled[:first].mean(axis=0)))
    spread = float(np.sqrt(pooled[:first].var(axis=0).sum()))
    effect = gap / spread if spread > 0 else (0.0 if gap <= 1e-12 else math.inf)
    return f"{permutations} permutations", (1 + as_large) / (1 + permutations), "standardised mean shift", effect


def _label_shift(
    then: Sequence[str], now: Sequence[str], permutations: int, rng: np.random.Generator
) -> tuple[str, float, str, float]:
    """Chi-square p-value of the 2 x labels table, and Cramer's V (Cramér 1946) of it."""
    from scipy.special import chdtrc

    labels, codes = np.unique(np.asarray([*then, *now], dtype=str), return_inverse=True)
    if len(labels) < 2:
        return "chi-square", 1.0, "Cramer's V", 0.0
    table = np.stack([np.bincount(part, minlength=len(labels)) for part in (codes[: len(then)], codes[len(then) :])])
    totals = table.sum(axis=0)
    rows = int(totals.sum())
    observed = float(_chi_square(table[1], totals))
    effect = math.sqrt(observed / rows)
    if (totals * (table.sum(axis=1).min() / rows)).min() >= SMALL_EXPECTED:
        return "chi-square", float(chdtrc(len(labels) - 1, observed)), "Cramer's V", effect
    drawn = rng.multivariate_hypergeometric(totals, len(now), size=permutations, method="marginals")
    as_large = int((_chi_square(drawn, totals) >= observed * (1 - 1e-9)).sum())
    return f"chi-square, {permutations} permutations", (1 + as_large) / (1 + permutations), "Cramer's V", effect


def _chi_square(second: NDArray[np.integer], totals: NDArray[np.integer]) -> NDArray[np.float64]:
    """Pearson's statistic of tables with the given column totals, from their second row [..., labels]."""
    rows = totals.sum()
    size = second.sum(axis=-1, keepdims=True)
    expected = totals * (size / rows)
    deviation = (second - expected) ** 2
    return (deviation / expected + deviation / (totals - expected)).sum(axis=-1)


def _confidence_shift(then: NDArray[np.floating], now: NDArray[np.floating]) -> tuple[str, float, str, float]:
    from scipy.stats import ks_2samp

    found = ks_2samp(then, now, method="asymp")
    return "Kolmogorov-Smirnov", float(min(found.pvalue, 1.0)), "KS distance", float(found.statistic)
