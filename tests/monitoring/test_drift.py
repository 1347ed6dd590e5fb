import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_assets.monitoring.drift import CAP, DriftResult, Reference, Window, accuracy_on_labels, drift
from ft_resources.errors import DataError, SpecError


def answers(kind, rows: int, rng: np.random.Generator, *, shift: float = 0.0, spam: float = 0.3, sure: float = 8.0):
    """Answered requests; embeddings with correlated dimensions of unequal spread."""
    mixing = np.diag(np.linspace(0.2, 2, 8)) + 0.3
    embeddings = (rng.normal(size=(rows, 8)) @ mixing + shift).astype(np.float32)
    labels = np.where(rng.uniform(size=rows) < spam, "spam", "ham").tolist()
    return kind(embeddings, labels, rng.beta(sure, 1.5, rows))


def test_false_alarms_keep_to_alpha_and_the_tests_reject_as_often_as_they_say():
    alarms = 0
    rejected = dict.fromkeys(("inputs", "predictions", "confidence"), 0)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        result = drift(answers(Reference, 150, rng), answers(Window, 80, rng), 0.1, 99, seed)
        alarms += result.alarm
        for name, test in result.tests.items():
            rejected[name] += test.p_value <= 0.1
    # 99.9 % of Binomial(200, .1) lie within 7..35; Holm may be conservative, so only the upper bound holds for alarms.
    assert alarms <= 35
    assert all(7 <= count <= 35 for count in rejected.values()), rejected


@pytest.mark.parametrize(
    ("change", "alarmed"),
    [({"shift": 0.9}, "inputs"), ({"spam": 0.55}, "predictions"), ({"sure": 3.0}, "confidence")],
)
def test_each_kind_of_shift_is_found_and_named(change: dict, alarmed: str):
    found = 0
    for seed in range(20):
        rng = np.random.default_rng(1000 + seed)
        result = drift(answers(Reference, 400, rng), answers(Window, 200, rng, **change), 0.01, 499, seed)
        found += result.alarmed == [alarmed]
        if result.alarm:
            assert alarmed in result.verdict
            assert any(reason.startswith(f"Shift in {alarmed}") for reason in result.reasons)
    assert found >= 17


def test_equal_input_gives_an_equal_result_that_survives_json():
    rng = np.random.default_rng(0)
    reference, window = answers(Reference, 100, rng), answers(Window, 100, rng, shift=1)
    result = drift(reference, window, 0.05, 199, 3)
    assert result == drift(reference, window, 0.05, 199, 3)
    assert DriftResult.model_validate_json(result.model_dump_json()) == result
    assert result.tests["inputs"].p_value == 1 / 200


def test_the_permutation_p_value_equals_a_plain_loop():
    rng = np.random.default_rng(4)
    reference, window = answers(Reference, 60, rng), answers(Window, 60, rng, shift=0.25)
    p = drift(reference, window, 0.05, 1999, 0).tests["inputs"].p_value
    pooled = np.concatenate([reference.embeddings, window.embeddings])

    def gap(order: np.ndarray) -> float:
        return float(np.linalg.norm(pooled[order[:60]].mean(axis=0) - pooled[order[60:]].mean(axis=0)))

    observed = gap(np.arange(120))
    plain = np.mean([gap(rng.permutation(120)) >= observed for _ in range(4000)])
    assert p == pytest.approx(plain, abs=0.04)


def test_effect_sizes_by_hand():
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(500, 4)).astype(np.float32)
    reference = Reference(noise, ["a"] * 250 + ["b"] * 250, np.linspace(0, 0.5, 500))
    window = Window(noise + 1, ["a"] * 500, np.linspace(0.5, 1, 500))
    tests = drift(reference, window, 0.05, 99).tests
    assert tests["inputs"].effect == pytest.approx(2 / np.sqrt(noise.var(axis=0).sum()), rel=1e-3)
    assert tests["predictions"].effect == pytest.approx(np.sqrt(1 / 3), rel=1e-6)
    assert tests["confidence"].effect == pytest.approx(1.0, abs=0.01)


def test_chi_square_equals_scipy_and_rare_labels_are_permuted():
    from scipy.stats import chi2_contingency

    rng = np.random.default_rng(6)
    reference, window = answers(Reference, 300, rng), answers(Window, 200, rng, spam=0.4)
    test = drift(reference, window, 0.05, 99).tests["predictions"]
    table = [[side.labels.count(label) for label in ("spam", "ham")] for side in (reference, window)]
    assert test.method == "chi-square"
    assert test.p_value == pytest.approx(chi2_contingency(table, correction=False).pvalue, rel=1e-9)
    rare = Window(window.embeddings, ["new", "new", *window.labels[2:]], window.confidence)
    test = drift(reference, rare, 0.05, 999).tests["predictions"]
    assert "permutations" in test.method
    exact = chi2_contingency([[c.labels.count(x) for x in ("spam", "ham", "new")] for c in (reference, rare)]).pvalue
    assert test.p_value == pytest.approx(exact, abs=0.1)


def test_one_label_and_constant_embeddings_are_no_drift():
    same = (np.ones((60, 3), dtype=np.float32), ["a"] * 60, np.full(60, 0.9))
    result = drift(Reference(*same), Window(*same), 0.05, 99)
    assert not result.alarm
    assert {test.p_value for test in result.tests.values()} == {1.0}
    moved = Window(same[0] + 1, *same[1:])
    result = drift(Reference(*same), moved, 0.05, 99)
    assert result.alarmed == ["inputs"]
    assert DriftResult.model_validate_json(result.model_dump_json()) == result


def test_too_few_rows_give_no_verdict():
    rng = np.random.default_rng(0)
    reference = answers(Reference, 100, rng)
    result = drift(reference, answers(Window, 49, rng, shift=9), 0.01, 999)
    assert result.verdict == "no verdict: 49 rows of 50 needed"
    assert not result.alarm and result.tests == {}
    assert drift(reference, answers(Window, 50, rng), 0.01, 999).tests
    assert drift(answers(Reference, 3, rng), answers(Window, 60, rng)).verdict.startswith(
        "no verdict: 3 reference rows"
    )
    assert drift(reference, answers(Window, 0, rng), min_rows=10).verdict == "no verdict: 0 rows of 10 needed"


def test_a_large_reference_is_sampled_and_says_so():
    rng = np.random.default_rng(0)
    rows = 200_000
    reference = Reference(
        np.broadcast_to(rng.normal(size=(1, 384)).astype(np.float32), (rows, 384)), ["a"] * rows, np.full(rows, 0.5)
    )
    window = Window(rng.normal(size=(300, 384)).astype(np.float32), ["a"] * 300, np.full(300, 0.5))
    start = time.process_time()
    result = drift(reference, window, 0.01, 299)
    assert time.process_time() - start < 10
    assert (result.reference_rows, result.compared_reference_rows, result.compared_window_rows) == (rows, CAP, 300)
    assert f"{CAP} of {rows} reference rows were compared, drawn at random." in result.reasons


def test_bad_input_is_refused():
    rng = np.random.default_rng(0)
    reference, window = answers(Reference, 100, rng), answers(Window, 100, rng)
    with pytest.raises(SpecError, match="299"):
        drift(reference, window, 0.01, 99)
    with pytest.raises(DataError, match="dimensions"):
        drift(reference, Window(window.embeddings[:, :4], window.labels, window.confidence))
    with pytest.raises(DataError, match="finite"):
        drift(reference, Window(window.embeddings * np.nan, window.labels, window.confidence))
    with pytest.raises(DataError, match="99 labels"):
        Window(window.embeddings, window.labels[1:], window.confidence)


@pytest.mark.parametrize(("right", "alarm"), [(80_000, False), (79_900, True), (95_000, False)])
def test_accuracy_alarms_only_beyond_the_limit(right: int, alarm: bool):
    truth = ["a"] * right + ["b"] * (100_000 - right)
    result = accuracy_on_labels(["a"] * 100_000, truth, 0.9, 0.1)
    assert result.alarm is alarm
    assert result.drop == pytest.approx(0.9 - right / 100_000)


def test_accuracy_ignores_what_has_no_label_and_does_not_alarm_by_chance():
    result = accuracy_on_labels(["a", "b", "a", "a"], ["a", None, float("nan"), "b"], 0.9)
    assert (result.rows, result.right, result.alarm) == (2, 1, False)
    nothing = accuracy_on_labels(["a"], [None], 0.9)
    assert (nothing.rows, nothing.accuracy, nothing.alarm) == (0, None, False)
    for reference in (1.5, float("nan")):
        with pytest.raises(DataError):
            accuracy_on_labels(["a"], ["a"], reference)


@given(st.integers(1, 60), st.integers(0, 60), st.floats(0.5, 1))
def test_accuracy_interval_holds_the_value_and_fewer_hits_never_calm_an_alarm(rows: int, right: int, reference: float):
    right = min(right, rows)
    results = [
        accuracy_on_labels(["a"] * rows, ["a"] * hits + ["b"] * (rows - hits), reference)
        for hits in (right, max(right - 1, 0))
    ]
    assert results[0].accuracy.low <= results[0].accuracy.value <= results[0].accuracy.high
    assert results[1].alarm or not results[0].alarm
