import json

import pytest

from bento.conversation import Field
from ft_assets.evaluation.generation.fields import compare, mark, number, same_value
from ft_assets.evaluation.generation.metrics import figures, row_counts
from ft_resources.errors import DataError

FIELDS = {
    "vendor": Field(type="string"),
    "total": Field(type="number"),
    "paid": Field(type="boolean", required=False),
    "note": Field(type="string", required=False),
}


def written(**values: object) -> str:
    return json.dumps({"vendor": "ACME", "total": 10, "paid": None, "note": None} | values)


@pytest.mark.parametrize(
    ("answer", "counts"),
    [
        (written(paid=True, note="x"), (4, 0, 0)),
        (written(paid=False, note="x"), (3, 1, 1)),  # a wrong value is one given wrongly and one missed
        (written(paid=True), (3, 0, 1)),  # missed
        ("not JSON", (0, 0, 4)),
    ],
)
def test_each_case_counts_exactly(answer, counts):
    reference = written(paid=True, note="x")
    found = row_counts("extraction", [answer], [reference], FIELDS)
    names = ["true_positives", "false_positives", "false_negatives"]
    assert tuple(found.loc[0, names].astype(int)) == counts


def test_an_invented_value_is_no_miss_and_agreeing_nulls_count_for_nothing():
    found = compare(written(note="made up"), written(), FIELDS)
    assert found.fields["note"].counts == (0, 1, 0)
    assert found.fields["paid"].counts == (0, 0, 0)
    assert [mark(found.fields[name]) for name in FIELDS] == ["right", "right", "right", "invented"]
    assert mark(compare(written(), written(paid=False), FIELDS).fields["paid"]) == "missing"
    assert mark(compare(written(total=11), written(), FIELDS).fields["total"]) == "wrong"
    assert found.share_right == 0.75


def test_an_answer_that_is_no_json_has_no_field_right_not_even_the_nulls():
    assert compare("{}", written(), FIELDS).share_right == 0
    assert compare(written()[:-1], written(), FIELDS).share_right == 0


def test_a_reference_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match="total"):
        compare(written(), written(total="ten"), FIELDS)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("ACME  Corp", "ACME Corp", True),
        ("ACME\u00a0Corp", "ACME Corp", True),
        ("ACME", "acme", False),
        ("1,234.50", "1234.5", True),
        ("1 234,50", "1234.5", True),
        ("1.234,50", "1234.5", True),
        ("1.234", "1234", False),  # English: one and a bit
        ("12.5", "12.6", False),
        (1, 1.0, True),
        (0.1 + 0.2, 0.3, True),
        (1, True, False),
        ("1", 1, False),
        (None, "", False),
        (None, None, True),
    ],
)
def test_values_are_the_same_but_for_blanks_and_number_format(one, other, same):
    assert same_value(one, other) is same
    assert same_value(other, one) is same


def test_what_is_no_number():
    assert number("1,23,4") is number("") is number("1.2.3") is number("ten") is None


def test_precision_recall_and_f1_are_over_all_values_of_all_rows():
    answers = [written(), written(vendor="B"), "nothing", written(note="made up")]
    found = figures("extraction", row_counts("extraction", answers, [written()] * 4, FIELDS), confidence=0.9)
    # 2 wanted a row: 2 + 1 + 0 + 2 right; 1 wrong and 1 invented; 1 wrong and 2 missed
    assert found["field_precision"].value == pytest.approx(5 / 7)
    assert found["field_recall"].value == pytest.approx(5 / 8)
    assert found["field_f1"].value == pytest.approx(10 / 15)
    assert found["valid_json"].value == 0.75
    assert found["exact_rows"].value == 0.25
    assert found["field_accuracy"].value == pytest.approx((1 + 0.75 + 0 + 0.75) / 4)
    assert "loss" not in found
    assert all(each.low <= each.value <= each.high and each.confidence == 0.9 for each in found.values())
