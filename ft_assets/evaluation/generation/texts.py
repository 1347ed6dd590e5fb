"""How alike an answer and its reference are, row by row."""

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence

_ONE_BY_ONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Kana and Han characters: nothing parts their words, so each counts by itself."""
_MARKS = "\u0300-\u036f\u0900-\u0903\u093a-\u094f\u0e31\u0e34-\u0e4e"
_WORD = re.compile(rf"[{_ONE_BY_ONE}]|(?:[^\W_{_ONE_BY_ONE}]|[{_MARKS}])+")


def words(text: str) -> list[str]:
    """Words and numbers of `text` without case and punctuation; Chinese and Japanese by the character."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def exact_match(answer: str, reference: str) -> float:
    """1 where the two are the same but for case and white space, else 0."""
    return float(answer.casefold().split() == reference.casefold().split())


def token_f1(answer: str, reference: str) -> float:
    """F1 of the bags of words (Rajpurkar et al. 2016, SQuAD); two texts without words are alike."""
    given, wanted = words(answer), words(reference)
    return _f1(sum((Counter(given) & Counter(wanted)).values()), given, wanted)


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, ROUGE-L)."""
    given, wanted = words(answer), words(reference)
    return _f1(common_subsequence(given, wanted), given, wanted)


def common_subsequence(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyro 2004)."""
    places: dict[Hashable, int] = {}
    for at, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << at
    every = (1 << len(one)) - 1
    row = every
    for token in other:
        match = row & places.get(token, 0)
        row = ((row + match) | (row - match)) & every
    return len(one) - row.bit_count()


def _f1(common: int, given: Sequence[str], wanted: Sequence[str]) -> float:
    return 2 * common / (len(given) + len(wanted)) if given or wanted else 1.0
