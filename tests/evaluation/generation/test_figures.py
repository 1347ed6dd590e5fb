"""Metrics of written answers, and the comparison of two models row by row."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU

from ft_assets.evaluation.generation.metrics import METRICS, SCORE, figures, row_counts
from ft_assets.evaluation.generation.paired import Gain, gain_interval, gain_of, p_worse, rows_for_margin
from ft_assets.evaluation.policy import THRESHOLDS
from ft_resources.errors import EvaluationError

ANSWERS = ["the cat sat on the mat", "a dog ran away over the hills", "no", "yes it does"]
WANTED = ["the cat is on the mat", "a dog ran far away over the hills", "no", "yes, it does so"]


def test_bleu_and_chrf_are_sacrebleus():
    found = figures("text-generation", row_counts("text-generation", ANSWERS, WANTED, {}), confidence=0.95)
    assert found["bleu"].value == pytest.approx(BLEU().corpus_score(ANSWERS, [WANTED]).score / 100)
    assert found["exact_match"].value == 0.25
    assert 0 < found["chrf"].low < found["chrf"].value < found["chrf"].high < 1
    assert found == figures("text-generation", row_counts("text-generation", ANSWERS, WANTED, {}), confidence=0.95)


def test_loss_is_per_token_of_all_rows_and_perplexity_follows():
    counts = row_counts("text-generation", ["a", "b"], ["a", "c"], {}).assign(loss=[2.0, 10.0], tokens=[2.0, 4.0])
    found = figures("text-generation", counts, confidence=0.95)
    assert found["loss"].value == 2
    assert found["perplexity"].value == pytest.approx(math.e**2)
    unknown = figures("text-generation", counts.assign(tokens=0.0), confidence=0.95)
    assert math.isnan(unknown["loss"].value)


def test_what_a_policy_can_ask_for_is_what_is_measured():
    for kind in SCORE:
        measured = {name for name, metric in METRICS.items() if kind in metric.kinds and metric.direction == "higher"}
        assert set(THRESHOLDS[kind]) == measured
        assert SCORE[kind] in measured


def test_a_bootstrap_interval_covers_the_true_share_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    names = ("true_positives", "false_positives", "false_negatives", "field_accuracy", "exact_rows", "valid_json")
    covered = 0
    for _ in range(100):
        right = (rng.random(80) < 0.6).astype(float)
        found = figures("extraction", pd.DataFrame(dict.fromkeys(names, right)), confidence=0.9)
        covered += found["exact_rows"].low <= 0.6 <= found["exact_rows"].high
    assert 0.8 < covered / 100 < 0.98


def test_answers_and_rows_must_agree():
    with pytest.raises(EvaluationError, match="1 answers for 2 rows"):
        row_counts("text-generation", ["a"], ["a", "b"], {})


def test_scores_of_0_and_1_give_the_published_interval():
    """Bonett and Price 2012: (won + 1) / (n + 2) and (lost + 1) / (n + 2) instead of the shares."""
    won, lost, rows = 9, 4, 50
    gain = gain_of([1] * won + [0] * (rows - won), [0] * won + [1] * lost + [0] * (rows - won - lost))
    up, down = (won + 1) / (rows + 2), (lost + 1) / (rows + 2)
    half = 1.959963984540054 * math.sqrt((up + down - (up - down) ** 2) / (rows + 2))
    found = gain_interval(gain, 0.95)
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((up - down - half, up - down + half))


def test_models_that_score_alike_show_a_margin_from_the_stated_number_of_rows_on():
    for margin in (0.02, 0.05, 0.3):
        needed = rows_for_margin(margin, 0.95)

        def low(rows: int) -> float:
            return gain_interval(gain_of(np.ones(rows), np.ones(rows)), 0.95, one_sided=True).low

        assert low(needed) > -margin
        assert needed == 1 or low(needed - 1) <= -margin


@pytest.mark.parametrize("spread", [2, 20])
def test_a_model_that_is_no_worse_is_rarely_said_to_be_and_one_that_is_worse_is_found(spread):
    rng = np.random.default_rng(1)

    def share_refused(mean: float) -> float:
        """Of draws of 120 rows on which the champion scores .6 on average."""
        refused = 0
        for _ in range(400):
            ours = rng.beta(mean * spread, (1 - mean) * spread, 120)
            refused += p_worse(gain_of(ours, rng.beta(0.6 * spread, 0.4 * spread, 120))) <= 0.05
        return refused / 400

    assert share_refused(0.6) <= 0.07
    assert share_refused(0.4) > 0.9


def test_a_mask_chooses_rows_and_none_are_no_evidence():
    ours, theirs = np.array([1.0, 0.0, 0.5]), np.array([0.0, 0.0, 1.0])
    assert gain_of(ours, theirs, [True, False, True]) == Gain(rows=2, mean=0.25, mean_square=0.625)
    nothing = gain_of(ours, theirs, [False] * 3)
    assert nothing.rows == 0
    with pytest.raises(EvaluationError, match="no rows"):
        gain_interval(nothing, 0.95)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_swapping_the_models_mirrors_the_interval(pairs):
    ours, theirs = zip(*pairs, strict=True)
    one, other = gain_interval(gain_of(ours, theirs), 0.9), gain_interval(gain_of(theirs, ours), 0.9)
    assert one.low == pytest.approx(-other.high, abs=1e-12)
    assert -1 <= one.low <= one.high <= 1
