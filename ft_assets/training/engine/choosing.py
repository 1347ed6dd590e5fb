"""Which epoch is kept where the validation rows are too few to tell epochs apart."""

import math

import numpy as np

STANDARD_ERRORS = 2.0
"""Chance alone makes a larger difference once in twenty times."""


def clearly_worse(errors: np.ndarray, before: np.ndarray) -> bool:
    """Whether rows are more wrong than they were, by more than two standard errors of the mean difference.

    Of many rows that weigh the same, three may be wrong that were right, with no other change. What is no number is
    clearly worse.

    Args:
        errors: float [rows], how wrong each row is.
        before: The same rows before.
    """
    differences = errors.astype(np.float64) - before
    deviation = differences.std(ddof=1) if len(differences) > 1 else 0.0
    return not differences.mean() <= STANDARD_ERRORS * deviation / math.sqrt(len(differences))
