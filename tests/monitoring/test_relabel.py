import pandas as pd
import pytest

from ft_assets.monitoring.relabel import rank
from ft_resources.errors import DataError


def answers(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["prediction_id", "confidence", "true_label", "rating"])


def test_strictly_below_most_uncertain_first_and_labelled_left_out():
    found = rank(
        answers(
            ("p1", 0.59, None, None), ("p2", 0.60, None, None), ("p3", 0.31, None, None), ("p4", 0.10, "spam", None)
        ),
        0.6,
        10,
    )
    assert found["prediction_id"].tolist() == ["p3", "p1"]
    assert found["rank"].tolist() == [1, 2]
    assert found["reasons"].tolist() == [["low_confidence"], ["low_confidence"]]


def test_a_bad_rating_is_a_reason_and_both_reasons_make_one_entry():
    found = rank(
        answers(("p1", 0.99, None, -1), ("p2", 0.98, None, 1), ("p3", 0.4, None, -1), ("p3", 0.4, None, 1)), 0.6, 10
    )
    assert found["prediction_id"].tolist() == ["p3", "p1"]
    assert found["reasons"].tolist() == [["low_confidence", "disagreed_feedback"], ["disagreed_feedback"]]


def test_a_label_in_any_feedback_settles_the_answer():
    found = rank(answers(("p1", 0.2, None, -1), ("p1", 0.2, "ham", None)), 0.6, 10)
    assert found.empty and {"rank", "reasons"} <= set(found.columns)


def test_ties_and_the_limit_do_not_depend_on_the_order_of_rows():
    frame = answers(*((f"p{at:02}", 0.5, None, None) for at in range(30)))
    once, again = rank(frame, 0.6, 7), rank(frame.sample(frac=1, random_state=3), 0.6, 7)
    pd.testing.assert_frame_equal(once, again)
    assert once["prediction_id"].tolist() == [f"p{at:02}" for at in range(7)]


def test_further_columns_are_carried_along_and_no_answers_are_no_queue():
    frame = answers(("p1", 0.2, None, None)).assign(text="hello")
    assert rank(frame, 0.6, 5)["text"].tolist() == ["hello"]
    assert list(rank(frame.iloc[:0], 0.6, 5).columns) == [*frame.columns, "rank", "reasons"]
    assert rank(frame, 0.6, 0).empty


def test_bad_answers_are_refused():
    for frame, match in (
        (answers(("p1", 0.2, None, None)).drop(columns="rating"), "rating"),
        (answers(("p1", None, None, None)), "confidence"),
        (answers((None, 0.2, None, None)), "id"),
        (answers(("p1", 0.2, None, "bad")), "rating"),
    ):
        with pytest.raises(DataError, match=match):
            rank(frame, 0.6, 5)
