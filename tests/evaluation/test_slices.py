import pandas as pd
import pytest

from ft_assets.evaluation.slices import length_buckets, slice_masks
from ft_resources.errors import EvaluationError


def test_every_kind_divides_all_rows(made):
    frame = made.predictions(300)
    found: dict[str, int] = {}
    for name, _, mask in slice_masks(frame):
        found[name] = found.get(name, 0) + int(mask.sum())
    assert found == {"length": 300, "label": 300, "origin": 300, "month": 300}


def test_length_buckets_are_thirds_in_order_with_bounds_in_the_name():
    texts = pd.Series(["x" * n for n in range(1, 91)])
    buckets = length_buckets(texts)
    assert buckets.value_counts(sort=False).to_dict() == {
        "up to 30 characters": 30,
        "31 to 60 characters": 30,
        "over 60 characters": 30,
    }
    assert buckets[30] == "31 to 60 characters"


@pytest.mark.parametrize(("lengths", "buckets"), [([5, 5, 5], 1), ([5, 5, 5, 9], 2), ([1], 1)])
def test_rows_of_one_length_stay_together(lengths: list[int], buckets: int):
    assert length_buckets(pd.Series(["x" * n for n in lengths])).nunique() == buckets


def test_a_row_without_a_time_is_in_the_month_unknown(made):
    frame = made.predictions(40)
    frame.loc[:3, "event_time"] = pd.NaT
    months = {value: int(mask.sum()) for name, value, mask in slice_masks(frame) if name == "month"}
    assert months["unknown"] == 4
    assert "2002-07" in months


def test_a_kind_with_one_value_is_no_slice_and_a_missing_column_is_named(made):
    frame = made.predictions(40).assign(origin="files")
    assert "origin" not in {name for name, _, _ in slice_masks(frame)}
    with pytest.raises(EvaluationError, match="event_time"):
        list(slice_masks(frame.drop(columns="event_time")))
