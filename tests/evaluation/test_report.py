import json
import math

import numpy as np
import pytest

from ft_assets.evaluation.consistency import require_consistent
from ft_assets.evaluation.report import EvalReport, Latency, brier
from ft_assets.evaluation.statistics import Interval
from ft_resources.errors import EvaluationError


def test_the_report_counts_what_the_predictions_say(made):
    frame = made.predictions(600, candidate_right=0.95, champion_right=0.90)
    report = made.report_of(frame)
    ours, theirs = frame["candidate_label"] == frame["label"], frame["champion_label"] == frame["label"]
    assert report.models["candidate"]["accuracy"].value == pytest.approx(0.95)
    assert report.models["champion"]["accuracy"].value == pytest.approx(0.90)
    assert report.models["majority"]["accuracy"].value == pytest.approx(2 / 3)
    assert report.models["candidate"]["accuracy"].low < 0.95 < report.models["candidate"]["accuracy"].high
    assert np.trace(report.confusion) == ours.sum()
    assert report.paired.only_candidate_right == (ours & ~theirs).sum()
    assert report.paired.only_champion_right == (theirs & ~ours).sum()
    assert report.retained.rows == frame["was_in_champion_test"].sum() == 450
    spam = next(each for each in report.slices if (each.name, each.value) == ("label", "spam"))
    assert (spam.rows, spam.candidate_right) == (200, (ours & (frame["label"] == "spam")).sum())
    assert sum(each.count for each in report.calibration.bins) == 600
    require_consistent(report)


def test_the_report_is_the_same_twice_and_survives_json(made):
    frame = made.predictions(200)
    report = made.report_of(frame)
    assert report == made.report_of(frame)
    assert EvalReport.model_validate_json(report.model_dump_json()) == report


def test_nan_survives_json():
    for part in (Interval(value=math.nan, low=0, high=1), Latency(p50_ms=1, p95_ms=math.nan, requests=2)):
        text = part.model_dump_json()
        assert json.loads(text)
        again = type(part).model_validate(json.loads(text)).model_dump()
        assert sum(isinstance(value, float) and math.isnan(value) for value in again.values()) == 1


def test_without_a_champion_nothing_is_paired(made):
    report = made.report_of(made.predictions(100, champion_right=None))
    assert report.champion is report.paired is report.retained is None
    assert "champion" not in report.models
    assert all(each.champion_right is None for each in report.slices)
    require_consistent(report)


def test_a_champion_with_a_label_the_task_has_dropped_is_wrong_there(made):
    frame = made.predictions(100, champion_right=1.0)
    frame.loc[:9, "champion_label"] = "newsletter"
    assert made.report_of(frame).models["champion"]["accuracy"].value == pytest.approx(0.9)


def test_brier_by_hand():
    assert brier(np.array([[0.8, 0.2], [0.4, 0.6]]), ["a", "a"], ["a", "b"]) == pytest.approx((0.08 + 0.72) / 2)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: f.drop(columns="majority_label"), "majority_label"),
        (lambda f: f.drop(columns="candidate_p_ham"), "candidate_p_ham"),
        (lambda f: f.assign(champion_label=None), "champion_label"),
        (lambda f: f.assign(candidate_label="eggs"), "eggs"),
        (lambda f: f.assign(row_id="1"), "twice"),
        (lambda f: f.iloc[:0], "no predictions"),
        (lambda f: f.assign(candidate_p_ham=f.candidate_p_ham * 2), "sum to 1"),
        (lambda f: f.assign(candidate_confidence=0.501), "confidence"),
        (
            lambda f: f.assign(
                candidate_p_ham=f.candidate_p_spam,
                candidate_p_spam=f.candidate_p_ham,
                candidate_confidence=1 - f.candidate_confidence,
            ),
            "most probable",
        ),
        (lambda f: f.assign(candidate_p_ham=np.inf), "finite"),
    ],
)
def test_predictions_that_cannot_be_true_are_refused(made, spoil, match: str):
    with pytest.raises(EvaluationError, match=match):
        made.report_of(spoil(made.predictions(60)), champion=made.champion)
