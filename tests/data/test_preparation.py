import re
import time
import unicodedata

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bento.preparation import MOST_MARKS, PATTERNS, find, mask, normalise, prepare

KINDS = list(PATTERNS)
_PARTS = (
    "ada@example.org b@c.co www.x.y http://z (12)3456789 (030) 123-4567 +14155552671 13812345678 4111111111111111 "
    "4111111111111112 5500-0000-0000-0004 3782 822463 10005 10.0.0.1 300.1.1.1 1.2.3.4.5 11010519491231002X "
    "110105194912310021 <EMAIL> \u0338 \u0301 é e\u0301 - . @ + ( ) a 1 X \x00 \x1f \u2028 \u00a0 漢"
)
FRAGMENTS = _PARTS.split(" ")
TEXTS = st.lists(st.sampled_from([*FRAGMENTS, " ", "\n"]) | st.text(max_size=5), max_size=20).map("".join)


@pytest.mark.parametrize(
    ("kind", "real"),
    [
        ("email", "ada.lovelace+news@mail.example.co.uk"),
        ("email", "o_o%x@a-b.io"),
        ("url", "https://example.org/a?b=c#d"),
        ("url", "WWW.example.org/buy"),
        ("phone", "+44 20 7946 0958"),
        ("phone", "+14155552671"),
        ("phone", "(415) 555-2671"),
        ("phone", "415.555.2671"),
        ("phone", "13812345678"),
        ("ip", "192.168.0.255"),
        ("credit_card", "4111111111111111"),
        ("credit_card", "4111 1111 1111 1111"),
        ("credit_card", "5500-0000-0000-0004"),
        ("credit_card", "3782 822463 10005"),
        ("credit_card", "378282246310005"),
        ("credit_card", "3056 930902 5904"),
        ("cn_id", "11010519491231002X"),
        ("cn_id", "11010519491231002x"),
        ("cn_id", "440524188001010014"),
    ],
)
def test_personal_data_becomes_a_typed_token(kind: str, real: str) -> None:
    text = f"Write {real}, or call."
    expected = f"Write {PATTERNS[kind].token}{' or' if kind == 'url' else ', or'} call."
    assert mask(text, [kind]) == (expected, {kind: 1})
    assert find(f"Write {real} ", [kind]) == [(kind, 6, 6 + len(real))]
    assert mask(text, [other for other in KINDS if other != kind and other not in ("phone", "credit_card")])[1] == {}


@pytest.mark.parametrize(
    ("kind", "similar"),
    [
        ("credit_card", "4111111111111112"),
        ("credit_card", "4111 1111 1111 1112"),
        ("credit_card", "0000000000000000"),
        ("credit_card", "411111111111"),
        ("cn_id", "110105194912310021"),
        ("cn_id", "11010519491231002Y"),
        ("ip", "256.1.1.1"),
        ("ip", "1.2.3.4.5"),
        ("ip", "1.2.3"),
        ("email", "someone at example.org"),
        ("email", "me@localhost"),
        ("phone", "2002-08-22"),
        ("phone", "12:36:16"),
        ("phone", "1999-2000"),
        ("phone", "order-13812345678-x"),
        ("phone", "138123456789"),
        ("url", "http-server"),
    ],
)
def test_what_only_looks_alike_stays(kind: str, similar: str) -> None:
    text = f"See {similar} there"
    assert mask(text, [kind]) == (text, {})
    assert find(text, [kind]) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("item 2 4111 1111 1111 1111", "item 2 <CREDIT_CARD>"),
        ("2024 4111 1111 1111 1111", "2024 <CREDIT_CARD>"),
        ("4111 1111 1111 1111 200 euros", "<CREDIT_CARD> 200 euros"),
        ("from 10.0.0.1:8080, 10.0.0.2.", "from <IP>:8080, <IP>."),
        ("a@b.co-c@d.co-e@f.co", "<EMAIL><EMAIL><EMAIL>"),
        ("(12)3456789(34)5678901", "<PHONE><PHONE>"),
        ("x@y.org4111111111111111", "<EMAIL><CREDIT_CARD>"),
        ("mail:ada@example.org;bob@example.org", "mail:<EMAIL>;<EMAIL>"),
        ("http://u:p@10.0.0.1/ada@example.org", "<URL>"),
    ],
)
def test_neighbours_do_not_hide_each_other(text: str, expected: str) -> None:
    assert mask(text, KINDS)[0] == expected


def test_only_the_asked_kinds_are_masked_and_each_is_counted() -> None:
    text = "ada@example.org, bob@example.org at 10.0.0.1"
    assert mask(text, ["email"]) == ("<EMAIL>, <EMAIL> at 10.0.0.1", {"email": 2})
    assert mask(text, ["ip"]) == ("ada@example.org, bob@example.org at <IP>", {"ip": 1})
    assert mask(text, []) == (text, {})
    assert [kind for kind, _, _ in find(text, KINDS)] == ["email", "email", "ip"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a\r\nb\rc\n\n\n\td  e \n", "a\nb\nc\nd e"),
        ("page one\x0cpage\x0btwo\x85", "page one page two"),
        ("be\x07ll\x00", "bell"),
        ("e\u0301", "é"),
        ("e\x07\u0301", "é"),
        ("a\u00a0\u3000b\u2028c", "a b c"),
        ("\ud800lone", "lone"),
        (" \n\t ", ""),
        ("e" + "\u0301" * 1_000 + "f", "é" + "\u0301" * (MOST_MARKS - 1) + "f"),
    ],
)
def test_normal_form(raw: str, expected: str) -> None:
    assert normalise(raw) == expected


@settings(deadline=None, max_examples=200)
@given(TEXTS)
@example("a\x01\u0301")
@example("ada@example.org\u0338")
@example("\u0f73" * 40)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not any(unicodedata.category(char) in ("Cc", "Cs") for char in once if char != "\n")
    once.encode()


@settings(deadline=None, max_examples=250)
@given(TEXTS, st.sets(st.sampled_from(KINDS)).map(sorted))
def test_masking_twice_changes_nothing_and_leaves_nothing(text: str, kinds: list[str]) -> None:
    once, counts = mask(text, kinds)
    assert find(once, kinds) == []
    assert mask(once, kinds) == (once, {})
    assert set(counts) <= set(kinds)


@settings(deadline=None, max_examples=250)
@given(TEXTS, st.sets(st.sampled_from(KINDS)).map(sorted), st.integers(1, 60))
@example("it is 1.2.3.4.5", ["ip"], 13)
@example("ada@example.org\u0338", ["email"], 100)
def test_preparing_twice_changes_nothing_and_leaves_nothing(text: str, kinds: list[str], most: int) -> None:
    once, _ = prepare(text, kinds, most)
    assert len(once) <= most
    assert find(once, kinds) == []
    assert prepare(once, kinds, most) == (once, {})


HARD = [
    *("a", "a@b.", "a@b.co-", "1 ", "1111 ", "1.1.", "+1", "12-345-", "(12)3456789", "4111 1111 1111 1111 "),
    *("x@y.zz4111111111111111", "11010519491231002X", "http://" + "a" * 2_000, "\x00", "\u0301\u0327", "\u0f73"),
]


@pytest.mark.parametrize("unit", HARD, ids=lambda unit: ascii(unit[:24]))
def test_a_megabyte_takes_little_longer_than_a_plain_one(unit: str, plain_megabyte_s: float) -> None:
    text = (unit * (1_000_000 // len(unit) + 1))[:1_000_000]
    started = time.process_time()
    prepare(text, KINDS, 20_000)
    # quadratic time would be thousands of times as long
    assert time.process_time() - started < 50 * plain_megabyte_s


@pytest.fixture(scope="module")
def plain_megabyte_s() -> float:
    text = ("The quick brown fox jumps over the lazy dog near the bank of the river. " * 20_000)[:1_000_000]
    started = time.process_time()
    prepare(text, KINDS, 20_000)
    return time.process_time() - started


def test_real_mails_hold_nothing_that_is_left(real_mails: pd.DataFrame) -> None:
    sample = real_mails["text"].sample(1_500, random_state=5)
    found = dict.fromkeys(KINDS, 0)
    for text in sample:
        prepared, counts = prepare(text, KINDS, 4_000)
        assert find(prepared, KINDS) == []
        assert not re.search(r"\w@\w+\.(com|net|org)\b", prepared)
        for kind, number in counts.items():
            found[kind] += number
    assert found["email"] > 500
    assert found["url"] > 1_000
    assert found["phone"] > 100
