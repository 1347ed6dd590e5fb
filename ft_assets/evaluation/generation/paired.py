"""Two models on the same rows, each row with a score within 0..1: how much better the first is, and how surely."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from ft_assets.evaluation.report import Part
from ft_assets.evaluation.statistics import Interval
from ft_resources.errors import EvaluationError


class Gain(Part):
    """Score of the first minus score of the second, row by row: enough of it to test it again."""

    rows: int
    mean: float
    mean_square: float


def gain_of(first: ArrayLike, second: ArrayLike, mask: ArrayLike | None = None) -> Gain:
    """The gain of `first` over `second`, scores [rows] within 0..1, on the rows of `mask` (default all)."""
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if mask is not None:
        difference = difference[np.asarray(mask, dtype=bool)]
    if not difference.size:
        return Gain(rows=0, mean=0.0, mean_square=0.0)
    return Gain(rows=difference.size, mean=float(difference.mean()), mean_square=float((difference**2).mean()))


def gain_interval(gain: Gain, confidence: float, *, one_sided: bool = False) -> Interval:
    """Adjusted Wald interval of the mean gain: one row won and one row lost by a whole point are added.

    For scores of 0 and 1 this is the interval of Bonett and Price 2012 (J Educ Behav Stat 37:479); like it, it does
    not collapse where the two never differ.

    Args:
        one_sided: As of `statistics.paired_difference_interval`.

    Raises:
        EvaluationError: There are no rows, or `confidence` is not within 0..1.
    """
    if not 0 < confidence < 1:
        raise EvaluationError(f"confidence {confidence} is not within 0..1", mend="Use for example 0.95.")
    mean, error = _adjusted(gain)
    z = NormalDist().inv_cdf(confidence if one_sided else (1 + confidence) / 2)
    low, high = max(-1.0, mean - z * error), min(1.0, mean + z * error)
    return Interval(value=gain.mean, low=low, high=high, confidence=confidence)


def p_worse(gain: Gain) -> float:
    """P-value against "the first is not worse", by the same adjusted Wald statistic; small where it is worse."""
    mean, error = _adjusted(gain)
    return NormalDist().cdf(mean / error)


def rows_for_margin(margin: float, confidence: float) -> int:
    """Fewest rows on which two models that score alike can be shown to differ by less than `margin` (one-sided)."""
    return max(1, math.floor(NormalDist().inv_cdf(confidence) * math.sqrt(2) / margin - 2) + 1)


def _adjusted(gain: Gain) -> tuple[float, float]:
    if gain.rows < 1:
        raise EvaluationError("the two models share no rows", mend="Evaluate both on one row at least.")
    rows = gain.rows + 2
    mean = gain.rows * gain.mean / rows
    variance = (gain.rows * gain.mean_square + 2) / rows - mean**2
    return mean, math.sqrt(variance / rows)
