"""Extraction, field by field: which values of an answer are those of its reference."""

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from bento.conversation import Fields, Value, parse_answer
from ft_resources.errors import DataError

_POINT = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?")
_COMMA = re.compile(r"[+-]?(?:\d{1,3}(?:\.\d{3})+(?:,\d+)?|\d+,\d{1,2})")


@dataclass(frozen=True)
class FieldResult:
    """One field of one row."""

    expected: Value
    answered: Value

    @property
    def right(self) -> bool:
        """The values are the same; two nulls are."""
        return same_value(self.expected, self.answered)

    @property
    def counts(self) -> tuple[int, int, int]:
        """True positives, false positives and false negatives: a wrong value is one of each of the latter."""
        if self.right:
            return int(self.expected is not None), 0, 0
        return 0, int(self.answered is not None), int(self.expected is not None)


@dataclass(frozen=True)
class Extracted:
    """An answer beside its reference; one that is no JSON object of the declared fields has no value of any."""

    valid: bool
    fields: Mapping[str, FieldResult]

    @property
    def share_right(self) -> float:
        """Share of the declared fields whose value is the reference's; 0 of an answer that is not valid."""
        return self.valid * sum(one.right for one in self.fields.values()) / len(self.fields)


def compare(answer: str, reference: str, fields: Fields) -> Extracted:
    """The answer of a model beside the reference, which fits the fields.

    Raises:
        DataError: The reference does not fit `fields`.
    """
    wanted = parse_answer(reference, fields)
    try:
        given: Mapping[str, Value] = parse_answer(answer, fields)
        valid = True
    except DataError:
        given, valid = {}, False
    return Extracted(valid, {name: FieldResult(wanted[name], given.get(name)) for name in fields})


def same_value(one: Value, other: Value) -> bool:
    """Whether two values are the same but for white space and the way a number is written (`1,234.50` is `1234.5`)."""
    if one is None or other is None or isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, str) and isinstance(other, str):
        first, second = _bare(one), _bare(other)
        return first == second or (number(first) is not None and number(first) == number(second))
    if isinstance(one, str) or isinstance(other, str):
        return False
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


def number(text: str) -> Decimal | None:
    """What `text` without blanks writes, with thousands and decimals parted in the English or the continental way."""
    if _POINT.fullmatch(text):
        return Decimal(text.replace(",", ""))
    if _COMMA.fullmatch(text):
        return Decimal(text.replace(".", "").replace(",", "."))
    return None


Mark = Literal["right", "wrong", "missing", "invented"]


def mark(result: FieldResult) -> Mark:
    """What a person is shown of a field."""
    if result.right:
        return "right"
    if result.answered is None:
        return "missing"
    return "invented" if result.expected is None else "wrong"


def _bare(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())
