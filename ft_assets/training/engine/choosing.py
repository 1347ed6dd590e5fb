"""Which epoch is kept where the validation rows are too few to tell epochs apart."""

import math

import numpy as np

ROUNDING = 1e-12
"""Of a mean of differences."""


def clearly_worse(errors: np.ndarray, before: np.ndarray) -> bool:
    """Whether rows are more wrong than they were, by more than a standard error of the mean difference.

    One row that is wrong where it was right, and no other change, is one standard error: not clearly worse. What is no
    number is.

    Args:
        errors: float [rows], how wrong each row is.
        before: The same rows before.
    """
    differences = errors.astype(np.float64) - before
    deviation = differences.std(ddof=1) if len(differences) > 1 else 0.0
    return not differences.mean() <= deviation / math.sqrt(len(differences)) + ROUNDING
