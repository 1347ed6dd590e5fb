import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_assets.evaluation.statistics import (
    bootstrap_interval,
    confusion_counts,
    ece,
    holm,
    mcnemar_exact,
    overall_figures,
    paired_difference_interval,
    reliability_bins,
    rows_for_margin,
    wilson_interval,
)
from ft_resources.errors import EvaluationError


def test_confusion_keeps_answers_outside_the_labels_as_errors():
    counts = confusion_counts(["a", "a", "b"], ["a", "z", None], ["a", "b"])
    assert counts.tolist() == [[1, 0, 1], [0, 0, 1]]
    assert float(overall_figures(counts)["accuracy"]) == pytest.approx(1 / 3)
    with pytest.raises(EvaluationError, match="z"):
        confusion_counts(["z"], ["a"], ["a", "b"])


def test_bootstrap_agrees_with_the_normal_approximation_is_seeded_and_fast():
    counts = np.array([[900, 100], [50, 950]])
    start = time.process_time()
    found = bootstrap_interval(counts, seed=7)
    assert time.process_time() - start < 0.5
    accuracy = found["accuracy"]
    half = 1.96 * np.sqrt(0.925 * 0.075 / 2000)
    assert accuracy.value == 0.925
    assert accuracy.low == pytest.approx(0.925 - half, abs=0.003)
    assert accuracy.high == pytest.approx(0.925 + half, abs=0.003)
    assert found == bootstrap_interval(counts, seed=7) != bootstrap_interval(counts, seed=8)


def test_bootstrap_equals_resampling_of_rows():
    rng = np.random.default_rng(3)
    truth, answers = rng.integers(0, 3, 400), rng.integers(0, 3, 400)
    answers[:300] = truth[:300]
    counts = confusion_counts(truth.astype(str).tolist(), answers.astype(str).tolist(), ["0", "1", "2"])
    f1 = []
    for _ in range(1000):
        rows = rng.integers(0, 400, 400)
        drawn = np.zeros((3, 3))
        np.add.at(drawn, (truth[rows], answers[rows]), 1)
        f1.append(float(overall_figures(drawn)["macro_f1"]))
    found = bootstrap_interval(counts)["macro_f1"]
    assert found.low == pytest.approx(np.quantile(f1, 0.025), abs=0.01)
    assert found.high == pytest.approx(np.quantile(f1, 0.975), abs=0.01)


def test_bootstrap_refuses_no_rows():
    with pytest.raises(EvaluationError, match="no rows"):
        bootstrap_interval(np.zeros((2, 2)))


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_equals_scipy(counts: tuple[int, int], confidence: float):
    from scipy.stats import binomtest

    right, rows = counts
    theirs = binomtest(right, rows).proportion_ci(confidence, method="wilson")
    ours = wilson_interval(right, rows, confidence)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_equals_the_binomial_test(first: int, second: int):
    from scipy.stats import binomtest

    if first + second == 0:
        assert mcnemar_exact(0, 0) == mcnemar_exact(0, 0, one_sided=True) == 1.0
        return
    pairs = first + second
    assert mcnemar_exact(first, second) == pytest.approx(binomtest(first, pairs).pvalue, rel=1e-9, abs=1e-12)
    less = binomtest(first, pairs, alternative="less").pvalue
    assert mcnemar_exact(first, second, one_sided=True) == pytest.approx(less, rel=1e-9, abs=1e-12)


def test_paired_interval_equals_the_r_package_propcis():
    # scoreci.mp(41, 48, 549, conf.level = 0.9) gives -0.0157 to 0.0414.
    found = paired_difference_interval(549, 48, 41, 0.9)
    assert (found.low, found.high) == pytest.approx((-0.0157, 0.0414), abs=5e-5)


@pytest.mark.parametrize(("rows", "first", "second"), [(50, 12, 2), (30, 0, 3), (200, 7, 11)])
def test_bounds_solve_the_score_equation_of_a_likelihood_maximised_by_search(rows: int, first: int, second: int):
    from scipy.optimize import minimize_scalar

    found = paired_difference_interval(rows, first, second, 0.95)
    for difference, expected in ((found.low, 1.959964), (found.high, -1.959964)):

        def minus_log_likelihood(p_second: float, difference: float = difference) -> float:
            p_first, rest = p_second + difference, 1 - 2 * p_second - difference
            return -sum(
                n * np.log(p) for n, p in ((first, p_first), (second, p_second), (rows - first - second, rest)) if n
            )

        bounds = (max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12)
        best = minimize_scalar(minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        spread = np.sqrt((2 * best + difference - difference**2) / rows)
        assert ((first - second) / rows - difference) / spread == pytest.approx(expected, abs=1e-3)


def test_paired_interval_of_equal_answers_is_not_empty():
    z = 1.6448536269514722
    found = paired_difference_interval(500, 0, 0, 0.95, one_sided=True)
    assert found.low == pytest.approx(-z * z / (500 + z * z), abs=1e-9)
    assert paired_difference_interval(10, 10, 0).high == pytest.approx(1.0)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))))
def test_paired_interval_is_antisymmetric_and_holds_its_value(counts: tuple[int, int, int]):
    rows, first, second = counts
    second = min(second, rows - first)
    ours, theirs = paired_difference_interval(rows, first, second), paired_difference_interval(rows, second, first)
    assert ours.low <= ours.value <= ours.high
    assert (ours.low, ours.high) == pytest.approx((-theirs.high, -theirs.low), abs=1e-9)


def test_lower_bound_never_falls_when_a_row_is_won():
    rows = 24
    low = {
        (b, c): paired_difference_interval(rows, b, c, one_sided=True).low
        for b, c in product(range(rows + 1), repeat=2)
        if b + c <= rows
    }
    for (b, c), bound in low.items():
        if c:
            assert low[b, c - 1] >= bound - 1e-9
        if (b + 1, c) in low:
            assert low[b + 1, c] >= bound - 1e-9


@pytest.mark.parametrize(("rows", "p_first", "p_second"), [(60, 0.1, 0.1), (60, 0.05, 0.15), (200, 0.02, 0.03)])
def test_paired_interval_covers_the_true_difference(rows: int, p_first: float, p_second: float):
    rng = np.random.default_rng(11)
    drawn = rng.multinomial(rows, [p_first, p_second, 1 - p_first - p_second], size=3000)
    found: dict[tuple[int, int], tuple[bool, bool]] = {}
    both = one = 0
    for first, second, _ in drawn.tolist():
        if (first, second) not in found:
            two_sided = paired_difference_interval(rows, first, second, 0.95)
            bound = paired_difference_interval(rows, first, second, 0.95, one_sided=True).low
            truth = p_first - p_second
            found[first, second] = (two_sided.low <= truth <= two_sided.high, bound <= truth)
        both += found[first, second][0]
        one += found[first, second][1]
    assert 0.935 <= both / 3000 <= 0.985
    assert 0.935 <= one / 3000 <= 0.985


def test_rows_for_margin_is_the_first_number_that_suffices():
    rows = rows_for_margin(0.02, 0.95)
    assert rows == 133
    assert paired_difference_interval(rows, 0, 0, one_sided=True).low > -0.02
    assert paired_difference_interval(rows - 1, 0, 0, one_sided=True).low <= -0.02


def test_counts_that_do_not_fit_are_refused():
    for call in (
        lambda: paired_difference_interval(10, 6, 5),
        lambda: paired_difference_interval(0, 0, 0),
        lambda: wilson_interval(3, 2),
        lambda: wilson_interval(1, 2, 1.0),
    ):
        with pytest.raises(EvaluationError):
            call()


def test_reliability_bins_and_ece_by_hand():
    bins = reliability_bins([0.55, 0.6, 0.95, 1.0, 0.91], [True, False, True, True, False])
    assert [(each.low, each.high, each.count) for each in bins] == [(0.5, 0.6, 2), (0.9, 1.0, 3)]
    assert ece(bins) == pytest.approx(0.4 * abs(0.5 - 0.575) + 0.6 * abs(2 / 3 - 2.86 / 3))
    for bad in ([1.2], [float("nan")]):
        with pytest.raises(EvaluationError, match="confidence"):
            reliability_bins(bad, [True])


def test_ece_of_honest_confidences_is_small_and_of_boasting_is_large():
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, 20_000)
    right = rng.uniform(size=20_000) < sure
    assert ece(reliability_bins(sure, right)) < 0.02
    assert ece(reliability_bins(np.full(20_000, 0.99), right)) == pytest.approx(0.24, abs=0.02)


def test_holm_by_hand_and_refuses_nan():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({}) == {}
    with pytest.raises(EvaluationError, match="a"):
        holm({"a": float("nan")})


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.data())
def test_holm_is_monotone(p_values: list[float], data: st.DataObject):
    at = data.draw(st.integers(0, len(p_values) - 1))
    raised = [*p_values]
    raised[at] = data.draw(st.floats(p_values[at], 1))
    before, after = (holm({str(i): p for i, p in enumerate(values)}) for values in (p_values, raised))
    assert all(after[name] >= before[name] - 1e-12 for name in before)
