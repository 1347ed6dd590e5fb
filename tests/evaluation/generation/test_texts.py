import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_assets.evaluation.generation.texts import common_subsequence, exact_match, rouge_l, token_f1, words

TEXTS = st.text("ab c,你é", max_size=12)


def slow_subsequence(one: str, other: str) -> int:
    """The textbook recursion, by rows."""
    row = [0] * (len(other) + 1)
    for letter in one:
        before, row = row, [0]
        for at, wanted in enumerate(other):
            row.append(before[at] + 1 if letter == wanted else max(row[-1], before[at + 1]))
    return row[-1]


@given(st.text("abc", max_size=20), st.text("abc", max_size=20))
def test_the_bit_parallel_subsequence_is_the_textbook_one(one, other):
    assert common_subsequence(one, other) == slow_subsequence(one, other)


def test_golden_values():
    # 6 words each, 5 in common and in order: 2 * 5 / 12
    assert rouge_l("the cat sat on the mat", "the cat is on the mat") == pytest.approx(5 / 6)
    # the order counts for ROUGE-L alone
    assert token_f1("mat the on", "on the mat") == 1
    assert rouge_l("mat the on", "on the mat") == pytest.approx(1 / 3)
    assert token_f1("It costs 5 euros.", "it costs: five euros") == pytest.approx(0.75)
    assert exact_match(" Paris\n", "paris") == 1
    assert exact_match("Paris.", "paris") == 0


def test_words_of_writings_without_blanks_and_with_marks():
    assert words("北京是首都。Beijing 2008") == ["北", "京", "是", "首", "都", "beijing", "2008"]
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words("Cafe\u0301 naïve") == ["café", "naïve"]


@given(TEXTS, TEXTS)
def test_every_score_is_symmetric_within_its_range_and_1_for_equal_texts(one, other):
    for score in (exact_match, token_f1, rouge_l):
        assert 0 <= score(one, other) <= 1
        assert score(one, other) == score(other, one)
        assert score(one, one) == 1
    assert rouge_l(one, other) <= token_f1(one, other)
