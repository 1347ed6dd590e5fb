"""Predictions and feedback in the ledger, on SQLite and on a real PostgreSQL server."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone

import pandas as pd
import pytest
import sqlalchemy as sa

from ft_assets.data.rows import ROW_COLUMNS, frame, row_id
from ft_resources import ledger_schema as schema
from ft_resources.errors import RequestError
from ft_resources.ledger import Ledger
from tests.resources.recording import NOON, TASK, answer, say


def test_a_prediction_is_read_back_as_it_was_logged(ledger: Ledger) -> None:
    answer(ledger, "p1", datetime(2002, 8, 1, 14, 30, 0, 123456, timezone(timedelta(hours=2))))
    found = ledger.prediction("p1")
    assert found["input"] == "the text of p1 – naïve"
    assert found["probabilities"] == {"ham": 0.75, "spam": 0.25}
    assert bytes(found["embedding"]) == b"\x00\x3c\xff"
    assert found["event_time"] == datetime(2002, 8, 1, 12, 30, 0, 123456, UTC)
    assert found["event_time"].utcoffset() == timedelta(0)
    with pytest.raises(RequestError) as caught:
        ledger.prediction("p2")
    assert (caught.value.error_code, caught.value.status) == ("unknown_prediction", 404)


def test_a_batch_is_logged_whole_or_not_at_all(ledger: Ledger) -> None:
    answer(ledger, "p1")
    row = ledger.prediction("p1")
    with pytest.raises(sa.exc.IntegrityError):
        ledger.log_predictions([{**row, "id": "p2"}, row])
    assert len(ledger.predictions_between(TASK, NOON, NOON + timedelta(days=1))) == 1
    ledger.log_predictions([])


def test_predictions_of_a_time_with_feedback_joined(ledger: Ledger) -> None:
    for hour, name in enumerate(("late", "early", "next")):
        answer(ledger, name, NOON + timedelta(hours=(5, 0, 12)[hour]))
    answer(ledger, "other", task="another")
    say(ledger, "late", "spam")
    say(ledger, "late", None, rating=-1)
    say(ledger, "next", "spam")
    rows = ledger.predictions_between(TASK, NOON, NOON + timedelta(hours=12))
    assert rows["id"].tolist() == ["early", "late"]
    assert rows["true_label"].tolist() == [None, "spam"]
    assert rows["rating"].tolist() == [None, -1]
    assert list(rows.columns) == [
        *(column.name for column in schema.predictions.c),
        "true_label",
        "rating",
        "true_text",
    ]
    nothing = ledger.predictions_between(TASK, NOON - timedelta(days=9), NOON - timedelta(days=8))
    assert nothing.empty
    for one in (rows, nothing):
        assert str(one["event_time"].dtype) == str(one["answered_at"].dtype) == "datetime64[us, UTC]"


def test_days_with_traffic_grow_as_labels_arrive(ledger: Ledger) -> None:
    answer(ledger, "p1", datetime(2002, 8, 1, 23, 59, 59, 999999, UTC))
    answer(ledger, "p2", datetime(2002, 8, 2, 0, 0, 0, 0, UTC))
    answer(ledger, "p3", datetime(2002, 8, 2, 1, 30, tzinfo=timezone(timedelta(hours=2))))
    answer(ledger, "p4", task="another")
    assert ledger.traffic_days(TASK) == {"2002-08-01": 2, "2002-08-02": 1}
    say(ledger, "p2", "spam")
    say(ledger, "p4", "spam")
    assert ledger.traffic_days(TASK) == {"2002-08-01": 2, "2002-08-02": 2}


def test_feedback_said_twice_is_stored_once_and_a_change_of_mind_counts(ledger: Ledger) -> None:
    answer(ledger, "p1")
    assert say(ledger, "p1", "spam") is True
    assert say(ledger, "p1", "spam") is False
    assert say(ledger, "p1", "ham") is True
    assert say(ledger, "p1", "spam") is True
    assert say(ledger, "p1", "spam", author="bob") is True
    assert say(ledger, "p1", None, rating=1) is True
    assert say(ledger, "p1", None, rating=1) is False
    rows = ledger.predictions_between(TASK, NOON, NOON + timedelta(days=1))
    assert rows["true_label"].tolist() == ["spam"]
    with pytest.raises(RequestError):
        say(ledger, "unknown", "spam")


def test_the_same_feedback_sent_many_times_at_once_is_stored_once(ledger: Ledger) -> None:
    answer(ledger, "p1")
    start = threading.Barrier(4)

    def send(_: int) -> bool:
        start.wait()
        return say(ledger, "p1", "spam")

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(send, range(4))) == 1


def test_labels_that_came_back_are_raw_rows(ledger: Ledger) -> None:
    answer(ledger, "p2", NOON + timedelta(hours=1))
    answer(ledger, "p1", NOON)
    answer(ledger, "p3")
    answer(ledger, "p4", task="another")
    say(ledger, "p2", "spam")
    say(ledger, "p1", "spam")
    say(ledger, "p1", "ham", author="bob")
    say(ledger, "p3", None, rating=1)
    say(ledger, "p4", "spam")
    rows = ledger.feedback_rows(TASK)
    assert list(rows.columns) == ROW_COLUMNS
    assert rows["source"].tolist() == ["feedback:p1", "feedback:p2"]
    assert rows["label"].tolist() == ["ham", "spam"]
    assert rows["label_version"].tolist() == [3, 2]
    assert rows["annotator"].tolist() == ["bob", "ada"]
    assert rows["origin"].tolist() == ["feedback", "feedback"]
    assert rows["event_time"].tolist() == [pd.Timestamp(NOON), pd.Timestamp(NOON + timedelta(hours=1))]
    assert rows["row_id"].tolist() == [row_id(text) for text in rows["text"]]
    agreed = frame(["a text"], ["ham"], ["a.jsonl#1"], [NOON.isoformat()], "files").dtypes
    assert rows.dtypes.to_dict() == agreed.to_dict()


def test_corrected_texts_are_raw_rows_too(ledger: Ledger) -> None:
    answer(ledger, "p1", label="", probabilities={}, output="Paris is nice.", finish_reason="length")
    assert ledger.prediction("p1")["output"] == "Paris is nice."
    long = "No, " + "much " * 200 + "better."
    assert ledger.add_feedback(prediction_id="p1", label=None, rating=-1, text=long, author="ada") is True
    assert ledger.add_feedback(prediction_id="p1", label=None, rating=-1, text=long, author="ada") is False
    assert ledger.feedback_rows(TASK)["label"].tolist() == [long]
    assert ledger.predictions_between(TASK, NOON, NOON + timedelta(days=1))["true_text"].tolist() == [long]
