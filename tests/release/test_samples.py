"""Which answers a sample request takes."""

import pytest

from ft_assets.release import golden
from ft_assets.release.samples import SampleRequest


@pytest.mark.parametrize(
    ("sample", "answer", "met"),
    [
        ({"label": "spam"}, "spam", True),
        ({"label": "spam"}, "ham", False),
        ({"contains": "14 days"}, "Within 14 Days of delivery.", True),
        ({"contains": "14 days"}, "Within two weeks.", False),
        ({"fields": {"total": 12}}, '{"number":"A1","total":12.0}', True),
        ({"fields": {"total": 12}}, '{"number":"A1","total":13}', False),
        ({"fields": {"total": 12, "number": "A2"}}, '{"number":"A1","total":12}', False),
        ({"fields": {"currency": None}}, '{"currency":null}', True),
        ({"fields": {"currency": None}}, '{"currency":"EUR"}', False),
        ({"fields": {"total": 12}}, '{"number":"A1","tot', False),
        ({"fields": {"total": 12}}, "12", False),
    ],
)
def test_what_is_expected_is_met_or_not(sample: dict, answer: str, met: bool) -> None:
    assert SampleRequest(text="x", **sample).met_by(answer) is met


def test_what_a_service_answered_wrongly_is_said_in_full() -> None:
    right = {"row_id": "r1", "expected": "ham", "answered": "ham", "expected_confidence": 0.9, "confidence": 0.91}
    sample = {"text": "y" * 500, "expected": "spam", "answered": "ham", "right": False, "confidence": 0.6}
    assert golden.complaints({"golden": [right]}) == []
    assert golden.complaints({"golden": []}) == ["no golden request was asked"]
    flipped, unsure = right | {"answered": "spam"}, right | {"confidence": 0.8}
    told = golden.complaints({"golden": [right, flipped, unsure], "test_requests": [sample]})
    assert told[0] == "golden request r1: answered 'spam' (0.91), evaluated was 'ham' (0.90)"
    assert told[1] == "golden request r1: answered 'ham' (0.80), evaluated was 'ham' (0.90)"
    assert told[2].startswith("test request 'yyy") and told[2].endswith("...': answered 'ham', expected spam")
    assert len(told[2]) < 200
    many = golden.complaints({"golden": [right, *[flipped] * 30]})
    assert len(many) == golden.MOST + 1 and many[-1] == "and 20 more"
