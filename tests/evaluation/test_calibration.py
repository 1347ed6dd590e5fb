import numpy as np
import pytest

from ft_assets.evaluation.calibration import HIGHEST, LOWEST, fit_temperature
from ft_resources.errors import EvaluationError


def drawn(temperature: float, rows: int = 20_000, labels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 3, (rows, labels))
    noise = rng.gumbel(size=logits.shape)
    return logits, (logits / temperature + noise).argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_made_the_labels_is_found(temperature: float):
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.05)


def test_it_is_the_minimum_of_the_likelihood():
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    logits, labels = drawn(1.7, rows=300)

    def nll(temperature: float) -> float:
        z = logits / temperature
        return float((logsumexp(z, axis=1) - z[np.arange(len(labels)), labels]).mean())

    found = minimize_scalar(nll, bounds=(LOWEST, HIGHEST), method="bounded", options={"xatol": 1e-9})
    assert fit_temperature(logits, labels) == pytest.approx(found.x, abs=1e-5)


def test_bounds_hold_where_the_optimum_lies_outside():
    logits = np.array([[4.0, 0.0], [0.0, 4.0]])
    assert fit_temperature(logits, np.array([0, 1])) == LOWEST
    assert fit_temperature(logits, np.array([1, 0])) == HIGHEST
    assert fit_temperature(np.zeros((3, 2)), np.array([0, 1, 1])) == 1.0
    assert fit_temperature(np.array([[3e4, -3e4], [-3e4, 3e4], [3e4, -3e4]]), np.array([0, 1, 1])) == HIGHEST


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (np.zeros((0, 2)), np.zeros(0, dtype=int)),
        (np.zeros((2, 1)), np.zeros(2, dtype=int)),
        (np.zeros((2, 2)), np.array([0, 2])),
        (np.zeros((2, 2)), np.array([0.0, 1.0])),
        (np.array([[np.nan, 0.0]]), np.array([0])),
    ],
)
def test_bad_input_is_refused(logits: np.ndarray, labels: np.ndarray):
    with pytest.raises(EvaluationError):
        fit_temperature(logits, labels)
