import numpy as np
import pytest

from ft_assets.evaluation.baselines import linear_baseline, majority_baseline
from ft_resources.errors import EvaluationError

TRAIN = [("cheap pills buy now", "spam"), ("meeting at noon tomorrow", "ham"), ("cheap watches buy today", "spam")] * 5
TEXTS, ANSWERS = [text for text, _ in TRAIN], [label for _, label in TRAIN]


def test_majority_answers_the_most_frequent_label_and_its_shares():
    found = majority_baseline(ANSWERS, 4)
    assert found.labels == ["spam"] * 4
    assert found.columns == ("ham", "spam")
    assert found.probabilities.tolist() == [[pytest.approx(1 / 3), pytest.approx(2 / 3)]] * 4
    assert majority_baseline(["b", "a"], 1).labels == ["a"]


def test_linear_learns_the_words_and_is_deterministic():
    asked = ["buy cheap things", "see you at the meeting tomorrow"]
    found, again = linear_baseline(TEXTS, ANSWERS, asked), linear_baseline(TEXTS, ANSWERS, asked)
    assert found.labels == ["spam", "ham"]
    assert np.array_equal(found.probabilities, again.probabilities)
    assert found.probabilities.sum(axis=1) == pytest.approx([1, 1])
    assert linear_baseline(TEXTS, ANSWERS, []).probabilities.shape == (0, 2)


def test_rows_that_cannot_be_learnt_from_are_refused():
    for texts, labels in ((["a b"], ["x"]), (["!!", "??"], ["x", "y"]), (["a"], ["x", "y"])):
        with pytest.raises(EvaluationError):
            linear_baseline(texts, labels, ["a"])
    with pytest.raises(EvaluationError):
        majority_baseline([], 1)
