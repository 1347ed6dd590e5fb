"""What each part of a text adds to the probability of a label: Shapley values of the words.

A part that is left out is taken out of the text. The values of up to EXACT parts are exact; beyond, they are means over
random orders of the parts and their reverses (Castro, Gomez and Tejada 2009, doi:10.1016/j.cor.2008.04.004; antithetic
orders: Mitchell et al. 2022, arXiv:2104.12199). In every single order the contributions add up to the whole text's
probability minus the empty text's, so their means do as well, however few orders there are.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import factorial

import numpy as np
import numpy.typing as npt

from bento.protocol import Attribution
from ft_resources.errors import RequestError

IDEOGRAM = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{IDEOGRAM}]|[^\s{IDEOGRAM}]+")
MOST_PARTS = 16
"""Neighbouring words of a longer text make up one part."""
EXACT = 7
PAIRS = 6
"""Random orders, each with its reverse."""


@dataclass(frozen=True)
class Explanation:
    """Shapley values of the parts of a text."""

    label: str
    probability: float
    base: float
    attributions: list[Attribution]


class Question:
    """What has to be scored to explain a text.

    Attributes:
        texts: To be scored; the first is the whole text, the second the empty one.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._parts = _parts(text)
        self._orders = _orders(text, len(self._parts))
        count = len(self._parts)
        whole = (1 << count) - 1
        sets = {whole: 0, 0: 1}
        if count <= EXACT:
            for members in range(whole):
                sets.setdefault(members, len(sets))
        for order in self._orders:
            members = 0
            for part in order:
                members |= 1 << part
                sets.setdefault(members, len(sets))
        self._sets = sets
        self.texts = [self._without(members) for members in sets]

    def explain(
        self, probabilities: npt.NDArray[np.floating], labels: Sequence[str], label: str | None = None
    ) -> Explanation:
        """The explanation of `label`, by default of the whole text's most probable one.

        Args:
            probabilities: Of `texts`, [texts, labels].

        Raises:
            RequestError: `unknown_label`.
        """
        if label is not None and label not in labels:
            known = f"Its labels: {', '.join(labels)}."
            raise RequestError("unknown_label", "the task has no such label", status=422, mend=known, field="label")
        column = list(labels).index(label) if label is not None else int(probabilities[0].argmax())
        scores = probabilities[:, column].astype(np.float64)
        weights = self._exact(scores) if len(self._parts) <= EXACT else self._sampled(scores)
        attributions = [
            Attribution(text=self._text[start:end], start=start, end=end, weight=float(weight))
            for (start, end), weight in zip(self._parts, weights, strict=True)
        ]
        return Explanation(labels[column], float(scores[0]), float(scores[1]), attributions)

    def _exact(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        count = len(self._parts)
        weights = np.zeros(count)
        for members, place in self._sets.items():
            size = members.bit_count()
            for part in range(count):
                if not members >> part & 1:
                    share = factorial(size) * factorial(count - size - 1) / factorial(count)
                    weights[part] += share * (scores[self._sets[members | 1 << part]] - scores[place])
        return weights

    def _sampled(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        weights = np.zeros(len(self._parts))
        for order in self._orders:
            members = 0
            for part in order:
                grown = members | 1 << part
                weights[part] += scores[self._sets[grown]] - scores[self._sets[members]]
                members = grown
        return weights / len(self._orders)

    def _without(self, members: int) -> str:
        """The text of some parts, with what stands between neighbours."""
        kept = [part for number, part in enumerate(self._parts) if members >> number & 1]
        return " ".join(self._text[start:end] for start, end in kept) if len(kept) < len(self._parts) else self._text


def visible(text: str, tokens: Callable[[str], Sequence[int]]) -> str:
    """The shortest start of `text`, up to the end of a word, whose tokens are those of the whole: the rest is not read.

    Args:
        tokens: Token ids of a text, cut where the model cuts them.
    """
    whole = list(tokens(text))
    ends = [match.end() for match in WORD.finditer(text)]
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        if list(tokens(text[: ends[middle]])) == whole:
            high = middle
        else:
            low = middle + 1
    return text[: ends[low]]


def _parts(text: str) -> list[tuple[int, int]]:
    """Spans of neighbouring words, at most MOST_PARTS."""
    words = [match.span() for match in WORD.finditer(text)]
    count = min(len(words), MOST_PARTS)
    bounds = [len(words) * number // count for number in range(count + 1)]
    return [(words[first][0], words[last - 1][1]) for first, last in itertools.pairwise(bounds)]


def _orders(text: str, count: int) -> list[list[int]]:
    """Orders of the parts, each followed by its reverse; equal texts have equal ones."""
    if count <= EXACT:
        return []
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
    orders = [random.permutation(count).tolist() for _ in range(PAIRS)]
    return [one for order in orders for one in (order, order[::-1])]
