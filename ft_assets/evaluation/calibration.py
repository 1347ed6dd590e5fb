"""One number that makes confidences honest: the temperature the logits are divided by."""

import numpy as np
from numpy.typing import ArrayLike

from ft_resources.errors import EvaluationError

LOWEST, HIGHEST = 0.05, 20.0


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """Temperature that minimises the mean negative log-likelihood (Guo et al. 2017, ICML).

    The likelihood is convex in 1 / temperature, so its slope (mean expected logit minus mean logit of the true label)
    crosses zero at most once, and bisection finds the one minimum.

    Args:
        logits: float [rows, labels], at least two labels.
        labels: int [rows], index of the true label.

    Returns:
        A value within 0.05..20; the bound itself where the optimum lies outside (rows all right or all wrong), and 1
        where temperature changes nothing.

    Raises:
        EvaluationError: No rows, shapes that don't fit, or logits that are not finite.
    """
    z = np.asarray(logits, dtype=np.float64)
    y = np.asarray(labels)
    if z.ndim != 2 or z.shape[1] < 2 or y.shape != z.shape[:1] or not len(y):
        raise EvaluationError(
            f"logits of shape {z.shape} and labels of shape {y.shape} don't fit", mend="Pass [rows, labels] and [rows]."
        )
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= z.shape[1]:
        raise EvaluationError("a label is not an index of a logit", mend="Pass the index of each row's true label.")
    if not np.isfinite(z).all():
        raise EvaluationError("a logit is not finite", mend="Lower the learning rate; training has diverged.")
    true = z[np.arange(len(y)), y].mean()
    top = z.max(axis=1, keepdims=True)
    if np.ptp(z, axis=1).max() == 0:
        return 1.0

    def slope(inverse: float) -> float:
        weights = np.exp((z - top) * inverse)
        return float(((weights * z).sum(axis=1) / weights.sum(axis=1)).mean() - true)

    low, high = 1 / HIGHEST, 1 / LOWEST
    if slope(low) >= 0:
        return HIGHEST
    if slope(high) <= 0:
        return LOWEST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)
