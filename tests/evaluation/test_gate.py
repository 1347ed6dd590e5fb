import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_assets.evaluation.decision import Decision
from ft_assets.evaluation.gate import GATES, decide
from ft_assets.evaluation.policy import GatePolicy
from ft_assets.evaluation.report import EvalReport
from ft_assets.evaluation.statistics import Interval
from ft_assets.evaluation.stored import served_precision
from ft_resources.errors import EvaluationError, GateRefusal

POLICY = GatePolicy()


def first(rows: int, right: int) -> np.ndarray:
    return np.arange(rows) < right


def changed(report: EvalReport, **parts: dict) -> EvalReport:
    """The report with some fields of some parts replaced."""
    data = report.model_dump()
    for part, fields in parts.items():
        data[part] = (data[part] | fields) if isinstance(data[part], dict) else fields
    return EvalReport.model_validate(data)


def test_a_good_candidate_passes_every_gate_with_a_sentence_each(made):
    report = made.report_of(made.predictions(1200, candidate_right=0.97, champion_right=0.955))
    decision = decide(report, POLICY)
    assert decision.passed, decision.verdict
    assert list(decision.gates) == list(GATES)
    assert all(result.reason.endswith(".") for result in decision.gates.values())
    assert Decision.model_validate_json(decision.model_dump_json()) == decision
    with pytest.raises(EvaluationError, match="meets_thresholds"):
        decision.gate("meets_treshold")


def test_what_cannot_be_served_is_judged_and_never_released(made):
    report = made.report_of(made.predictions(1200, candidate_right=0.97)).model_copy(update={"serving": None})
    decision = decide(report, POLICY)
    assert decision.passed
    assert decision.gate("serves_what_was_evaluated").word == "n/a"
    assert "no release" in decision.verdict
    with pytest.raises(GateRefusal, match="cannot be served"):
        served_precision(report)


@pytest.mark.parametrize(("right", "passed"), [(449, False), (450, True), (451, True)])
def test_the_threshold_itself_passes_and_a_thousandth_below_is_blocked(made, right: int, passed: bool):
    report = made.counted(first(1000, right))
    result = decide(report, GatePolicy(thresholds={"accuracy": 0.45})).gate("meets_thresholds")
    assert result.passed is passed
    assert f"{right / 1000:.3f}" in result.reason
    assert result.evidence["accuracy"] == right / 1000


def test_one_missed_threshold_of_several_is_named(made):
    report = made.counted(first(100, 90))
    result = decide(report, GatePolicy(thresholds={"accuracy": 0.8, "macro_f1": 0.95})).gate("meets_thresholds")
    assert not result.passed
    assert "macro_f1" in result.reason and "accuracy" not in result.reason


@pytest.mark.parametrize(("rows", "passed"), [(19, False), (20, True)])
def test_too_few_test_rows_decide_nothing(made, rows: int, passed: bool):
    result = decide(made.counted(first(rows, rows)), POLICY).gate("meets_thresholds")
    assert result.passed is passed
    assert passed or "too few" in result.reason


def test_the_first_release_must_beat_the_majority_baseline(made):
    truth = np.array(["ham"] * 70 + ["spam"] * 30)
    for right, passed in ((70, False), (71, True)):
        decision = decide(made.counted(first(100, right), truth=truth), POLICY)
        result = decision.gate("not_worse_than_champion")
        assert result.passed is passed
        assert "First release" in result.reason and "0.700" in result.reason
        assert decision.gate("no_slice_regression").passed and decision.gate("no_forgetting").passed
        assert "First release" in decision.gate("no_forgetting").reason


def test_equal_answers_pass_on_enough_rows_only(made):
    for rows, passed in ((132, False), (133, True)):
        report = made.counted(first(rows, rows - 10), first(rows, rows - 10))
        result = decide(report, POLICY).gate("not_worse_than_champion")
        assert result.passed is passed
        assert passed or "133" in result.reason


def test_a_loss_within_the_margin_that_chance_could_explain_is_still_blocked(made):
    champion = first(1000, 900)
    one_point_worse = np.roll(first(1000, 890), 0)
    noisy = one_point_worse ^ (np.arange(1000) % 10 == 0)
    assert decide(made.counted(one_point_worse, champion), POLICY).gate("not_worse_than_champion").passed
    result = decide(made.counted(noisy, champion), POLICY).gate("not_worse_than_champion")
    assert not result.passed
    assert result.evidence["lower_bound"] <= -0.02


def regressing(made, slice_rows: int = 1000, lost: int = 60, won: int = 10) -> EvalReport:
    """Two points better overall, five points worse on the slice `group = feedback`."""
    rows = 4 * slice_rows
    group = np.where(np.arange(rows) < slice_rows, "feedback", "package")
    champion = np.ones(rows, dtype=bool)
    champion[:won] = False
    champion[slice_rows : slice_rows + 250 * slice_rows // 1000] = False
    candidate = np.ones(rows, dtype=bool)
    candidate[won : won + lost] = False
    candidate[-120 * slice_rows // 1000 :] = False
    return made.counted(candidate, champion, group=group)


def test_a_better_candidate_with_one_worse_slice_is_blocked_and_the_slice_is_named(made):
    report = regressing(made)
    gain = report.models["candidate"]["accuracy"].value - report.models["champion"]["accuracy"].value
    assert gain == pytest.approx(0.02)
    decision = decide(report, POLICY)
    assert decision.gate("not_worse_than_champion").passed
    result = decision.gate("no_slice_regression")
    assert not result.passed and not decision.passed
    assert "group = feedback loses 5.0 points on 1000 rows" in result.reason
    assert result.evidence["worst_slice"] == "group = feedback"
    assert "no_slice_regression" in decision.verdict


def test_a_slice_is_blocked_only_beyond_margin_and_chance_and_with_enough_rows(made):
    blocked = regressing(made)
    assert not decide(blocked, POLICY).gate("no_slice_regression").passed
    assert decide(blocked, GatePolicy(slice_margin=0.05)).gate("no_slice_regression").passed
    assert decide(blocked, GatePolicy(slice_min_rows=1001)).gate("no_slice_regression").passed is True
    by_chance = regressing(made, slice_rows=100, lost=6, won=1)
    result = decide(by_chance, POLICY).gate("no_slice_regression")
    assert result.passed
    assert result.evidence["worst_drop"] == pytest.approx(0.05)
    assert result.evidence["worst_p"] > 0.05


@pytest.mark.parametrize(("least", "passed"), [(1000, False), (1001, True)])
def test_a_slice_of_just_enough_rows_is_judged(made, least: int, passed: bool):
    result = decide(regressing(made), GatePolicy(slice_min_rows=least)).gate("no_slice_regression")
    assert result.passed is passed


@pytest.mark.parametrize(("slices", "passed"), [(1, False), (10, True)])
def test_the_more_slices_are_judged_the_more_evidence_one_needs(made, slices: int, passed: bool):
    group = np.arange(1000) // (1000 // slices)
    champion = np.ones(1000, dtype=bool)
    candidate = np.arange(1000) >= 6
    if slices == 1:
        candidate = np.arange(1000) >= 40
    result = decide(made.counted(candidate, champion, group=group.astype(str)), POLICY).gate("no_slice_regression")
    assert result.passed is passed
    if slices == 10:
        assert result.evidence["worst_drop"] == 0.06
        assert result.evidence["worst_p"] == pytest.approx(10 * 0.5**6)


def test_forgetting_is_judged_on_the_rows_of_the_champion_alone(made):
    rows = 1200
    of_champion = np.arange(rows) % 4 != 0
    champion = of_champion.copy()
    candidate = np.ones(rows, dtype=bool)
    candidate[np.flatnonzero(of_champion)[:60]] = False
    decision = decide(made.counted(candidate, champion), POLICY)
    assert decision.gate("not_worse_than_champion").passed
    result = decision.gate("no_forgetting")
    assert not result.passed
    assert "-6.7 points on 900 rows the champion was tested on" in result.reason


@pytest.mark.parametrize(
    ("part", "field", "limit", "beyond", "gate"),
    [
        ("latency", "p95_ms", 200.0, 200.1, "within_latency_budget"),
        ("serving", "agreement", 0.99, 0.9899, "serves_what_was_evaluated"),
    ],
)
def test_the_limit_passes_and_beyond_it_is_blocked(made, part, field, limit, beyond, gate):
    report = made.counted(first(100, 90))
    assert decide(changed(report, **{part: {field: limit}}), POLICY).gate(gate).passed
    result = decide(changed(report, **{part: {field: beyond}}), POLICY).gate(gate)
    assert not result.passed
    assert f"{beyond:g}" in result.reason


@pytest.mark.parametrize(("error", "passed"), [(0.1, True), (0.101, False)])
def test_calibration_limit(made, error: float, passed: bool):
    report = made.counted(first(100, 90))
    bins = [report.calibration.bins[0].model_dump() | {"confidence": 0.9 - error}]
    result = decide(changed(report, calibration={"ece": error, "bins": bins}), POLICY).gate("calibrated")
    assert result.passed is passed


@pytest.mark.parametrize(
    ("changes", "gate"),
    [
        ({"latency": {"requests": 0}}, "within_latency_budget"),
        ({"serving": {"rows": 0}}, "serves_what_was_evaluated"),
        ({"calibration": {"bins": []}}, "calibrated"),
        ({"paired": None}, "not_worse_than_champion"),
        ({"retained": None}, "no_forgetting"),
        ({"retained": {"rows": 0, "only_candidate_right": 0, "only_champion_right": 0}}, "no_forgetting"),
        ({"slices": []}, "no_slice_regression"),
        ({"per_label": {}}, "meets_thresholds"),
    ],
)
def test_what_was_not_measured_does_not_pass(made, changes: dict, gate: str):
    report = made.counted(first(400, 390), first(400, 390))
    assert decide(report, POLICY).passed
    data = report.model_dump()
    for part, fields in changes.items():
        data[part] = (data[part] | fields) if fields and isinstance(data[part], dict) else fields
    result = decide(EvalReport.model_validate(data), POLICY).gate(gate)
    assert not result.passed


@pytest.mark.parametrize("model", ["candidate", "champion"])
def test_a_model_without_figures_does_not_pass(made, model: str):
    report = made.counted(first(400, 390), first(400, 390))
    models = {name: figures for name, figures in report.models.items() if name != model}
    decision = decide(report.model_copy(update={"models": models}), POLICY)
    assert not decision.gate("not_worse_than_champion").passed


def float_paths(node: object, path: tuple = ()) -> list[tuple]:
    if isinstance(node, float):
        return [path]
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in items for found in float_paths(value, (*path, key))]


def test_no_nan_anywhere_passes(made):
    report = made.counted(first(400, 395), first(400, 390))
    assert decide(report, POLICY).passed
    paths = [path for path in float_paths(report.model_dump()) if path[-1] != "confidence" or "bins" in path]
    assert len(paths) > 40
    for path in paths:
        data = report.model_dump()
        node = data
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = math.nan
        assert not decide(EvalReport.model_validate(data), POLICY).passed, path


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rows": 401}, "counts 400 rows of 401"),
        ({"paired": {"rows": 399}}, "399 rows of 400"),
        ({"paired": {"only_candidate_right": 398, "only_champion_right": 398}}, "exceed"),
        ({"paired": {"only_candidate_right": 9}}, "accuracies differ"),
        ({"retained": {"rows": 401}}, "exceed"),
        ({"champion": None}, "none is named"),
        ({"serving": {"agreement": 1.2}}, "serving"),
        ({"latency": {"p50_ms": 30.0}}, "latency"),
        ({"calibration": {"ece": 0.05}}, "calibration"),
        ({"labels": ["spam", "ham", "eggs"]}, "not 3 x 3"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(made, changes: dict, match: str):
    report = made.counted(first(400, 395), first(400, 390))
    data = report.model_dump()
    for part, value in changes.items():
        data[part] = data[part] | value if isinstance(value, dict) else value
    with pytest.raises(EvaluationError, match=match):
        decide(EvalReport.model_validate(data), POLICY)


def test_an_accuracy_that_the_confusion_matrix_denies_is_refused(made):
    report = made.counted(first(400, 300))
    figures = report.models["candidate"] | {"accuracy": Interval(value=0.95, low=0.9, high=0.97)}
    with pytest.raises(EvaluationError, match=r"accuracy is 0\.9500, by the confusion matrix 0\.7500"):
        decide(report.model_copy(update={"models": report.models | {"candidate": figures}}), POLICY)


@pytest.mark.parametrize(
    "change", [{"candidate_right": 999}, {"only_candidate_right": 4}, {"rows": 0}, {"champion_right": None}]
)
def test_a_slice_that_cannot_be_is_refused(made, change: dict):
    report = made.counted(first(400, 395), first(400, 390))
    slices = [report.slices[0].model_copy(update=change)]
    with pytest.raises(EvaluationError, match="slice"):
        decide(report.model_copy(update={"slices": slices}), POLICY)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_strictly_better_candidate_is_never_refused_where_the_worse_one_passed(made, data: st.DataObject):
    """Winning one more row, with all else equal or better, turns no gate from pass to refuse."""
    rows = data.draw(st.sampled_from([40, 150, 400]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    champion = (
        rng.uniform(size=rows) < data.draw(st.sampled_from([0.5, 0.9, 0.99])) if data.draw(st.booleans()) else None
    )
    base = champion if champion is not None else rng.uniform(size=rows) < 0.8
    candidate = base ^ (rng.uniform(size=rows) < data.draw(st.sampled_from([0.005, 0.05, 0.3])))
    wrong = np.flatnonzero(~candidate)
    if not len(wrong):
        return
    better = candidate.copy()
    better[rng.choice(wrong, size=int(rng.integers(1, len(wrong) + 1)), replace=False)] = True
    group = rng.choice(["a", "b", "c"], rows)
    policy = GatePolicy(
        thresholds={"accuracy": 0.8, "macro_f1": 0.7, "macro_precision": 0.7, "macro_recall": 0.7},
        non_inferiority_margin=data.draw(st.sampled_from([0.01, 0.05, 0.2])),
        forgetting_margin=0.05,
        slice_min_rows=10,
    )
    before = decide(made.counted(candidate, champion, group=group), policy)
    after = decide(made.counted(better, champion, group=group), policy)
    for name, result in before.gates.items():
        assert after.gate(name).passed or not result.passed, (name, result.reason, after.gate(name).reason)


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 1000), st.floats(0.1, 1000))
def test_faster_and_more_faithful_never_turns_a_pass_into_a_refusal(made, a: float, b: float, slow: float, fast: float):
    report = made.counted(first(100, 95))
    (worse, better), (fast, slow) = sorted((a, b)), sorted((slow, fast))
    before, after = (
        decide(changed(report, serving={"agreement": agreement}, latency={"p50_ms": 0.1, "p95_ms": ms}), POLICY)
        for agreement, ms in ((worse, slow), (better, fast))
    )
    for name, result in before.gates.items():
        assert after.gate(name).passed or not result.passed


def test_the_gate_imports_nothing_heavy():
    heavy = "torch transformers evaluate datasets sklearn matplotlib scipy dagster mlflow bentoml jinja2"
    code = (
        "import sys, ft_assets.evaluation.gate, ft_assets.evaluation.html, ft_assets.plots\n"
        "import ft_assets.evaluation.calibration, ft_assets.evaluation.baselines\n"
        "import ft_assets.monitoring.drift, ft_assets.monitoring.relabel, ft_assets.monitoring.plots\n"
        f"print(sorted(set('{heavy}'.split()) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
