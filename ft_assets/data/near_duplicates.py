"""Near-duplicate texts: MinHash proposes pairs, exact Jaccard similarity of shingles decides.

MinHash: Broder, On the resemblance and containment of documents (1997). Banding into buckets: Leskovec, Rajaraman,
Ullman, Mining of Massive Datasets, chapter 3.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Pair = tuple[int, int, float]

PERMUTATIONS = 128
SEED = 20_231
LEAST_RECALL = 0.999
CROWD = 50
_BATCH = 2_000

# Scripts written without blanks count one character as one word.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ffff"
_WORD = re.compile(f"[{_CJK}]|[^\\W{_CJK}]+")
_FEWEST_WORDS = 5


def shingles(text: str) -> set[str]:
    """What two texts are compared by: runs of three words; for fewer than five words, runs of three characters.

    Case and everything between words is ignored; a text without any word is its own only shingle.
    """
    words = _WORD.findall(text.casefold())
    if len(words) >= _FEWEST_WORDS:
        return {" ".join(words[at : at + 3]) for at in range(len(words) - 2)}
    short = " ".join(words)
    if len(short) < 3:
        return {f"\0{short or text.strip()}"}
    return {f"\0{short[at : at + 3]}" for at in range(len(short) - 2)}


def hashed(texts: Sequence[str]) -> list[Hashes]:
    """Sorted 64-bit hashes of each text's shingles; the same in every process."""
    import rensa

    found: list[Hashes] = []
    for start in range(0, len(texts), _BATCH):
        tokens = [sorted(shingles(text)) for text in texts[start : start + _BATCH]]
        found += [np.unique(np.array(row, dtype=np.uint64)) for row in rensa.RMinHash.hash_token_sets(tokens)]
    return found


def jaccard(a: Hashes, b: Hashes) -> float:
    """Shared shingles over all shingles of two texts; `a` and `b` are sorted and not empty."""
    small, large = (a, b) if len(a) <= len(b) else (b, a)
    places = np.searchsorted(large, small)
    shared = int(np.count_nonzero(large[np.minimum(places, len(large) - 1)] == small))
    return shared / (len(a) + len(b) - shared)


def pairs(texts: Sequence[str], similarity: float) -> list[Pair]:
    """Near pairs (i, j, jaccard) with i < j and jaccard >= similarity, ascending.

    Listed is every pair that banding proposes and exact similarity confirms, with two savings that leave the connected
    components as they are: texts with the same shingles are linked to the first of them only, and among more than CROWD
    texts of one bucket a pair that is connected already is not compared. The banding is chosen so that a pair at the
    threshold is proposed with probability LEAST_RECALL or more.
    """
    return near_pairs(hashed(texts), similarity)


def near_pairs(rows: Sequence[Hashes], similarity: float) -> list[Pair]:
    """`pairs` on the hashed shingles of the texts."""
    first: dict[bytes, int] = {}
    found: list[Pair] = []
    distinct: list[int] = []
    for index, row in enumerate(rows):
        original = first.setdefault(row.tobytes(), index)
        if original == index:
            distinct.append(index)
        else:
            found.append((original, index, 1.0))
    forest = Forest(len(rows))
    compared: set[tuple[int, int]] = set()
    for bucket in _buckets([rows[index] for index in distinct], similarity):
        members = [distinct[place] for place in bucket]
        crowded = len(members) > CROWD
        for at, left in enumerate(members):
            if crowded and forest.connects(members):
                break
            for right in members[at + 1 :]:
                if crowded and forest.find(left) == forest.find(right):
                    continue
                if (left, right) in compared:
                    continue
                compared.add((left, right))
                # The ratio of sizes bounds the similarity from above.
                sizes = sorted((len(rows[left]), len(rows[right])))
                if sizes[0] < similarity * sizes[1]:
                    continue
                score = jaccard(rows[left], rows[right])
                if score >= similarity:
                    found.append((left, right, score))
                    forest.join(left, right)
    return sorted(found)


def clusters(n: int, near: Sequence[Pair]) -> list[int]:
    """For each of `n` texts the smallest index it is connected to through `near` pairs."""
    forest = Forest(n)
    for left, right, _ in near:
        forest.join(left, right)
    return [forest.find(index) for index in range(n)]


class Forest:
    """Disjoint sets of 0..n-1, each named by its smallest member."""

    def __init__(self, n: int) -> None:
        self._parent = list(range(n))

    def find(self, index: int) -> int:
        parent = self._parent
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def connects(self, members: Sequence[int]) -> bool:
        root = self.find(members[0])
        return all(self.find(member) == root for member in members)

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self._parent[max(a, b)] = min(a, b)


def band_rows(similarity: float) -> int:
    """The most rows a band may have while pairs at `similarity` still meet in a bucket with LEAST_RECALL."""
    fitting = [
        rows
        for rows in range(1, PERMUTATIONS + 1)
        if 1 - (1 - similarity**rows) ** (PERMUTATIONS // rows) >= LEAST_RECALL
    ]
    return max(fitting, default=1)


def _buckets(rows: Sequence[Hashes], similarity: float) -> Iterator[list[int]]:
    """Groups of rows that agree on all values of one band of their MinHash signatures."""
    if len(rows) < 2:
        return
    signatures = _signatures(rows)
    width = band_rows(similarity)
    for start in range(0, PERMUTATIONS - width + 1, width):
        band = np.ascontiguousarray(signatures[:, start : start + width])
        keys = band.view(np.dtype((np.void, band.itemsize * width))).ravel()
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        for group in np.split(order, edges):
            if len(group) > 1:
                yield sorted(group.tolist())


def _signatures(rows: Sequence[Hashes]) -> NDArray[np.uint32]:
    import rensa

    blocks: list[Any] = []
    for start in range(0, len(rows), _BATCH):
        batch = [row.tolist() for row in rows[start : start + _BATCH]]
        matrix = rensa.RMinHash.digest_matrix_from_token_hash_sets(batch, PERMUTATIONS, SEED)
        blocks.append(np.array(matrix.to_rows(), dtype=np.uint32))
    return np.concatenate(blocks)
