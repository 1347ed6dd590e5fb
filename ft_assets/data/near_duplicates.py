"""Near-duplicates: MinHash candidates (Broder, 1997) from rensa, each confirmed by its exact Jaccard similarity."""

from collections.abc import Sequence

WORDS = 3
PERMUTATIONS = 128
SEED = 42
MOST_CANDIDATES = 64
"""Candidates compared per row, earliest first: a thousand copies of one text are all compared with its first rows."""


def shingles(text: str) -> frozenset[str]:
    """Overlapping word triples of the lower-cased text; of shorter texts its words."""
    words = text.lower().split()
    if len(words) < WORDS + 2:
        return frozenset(words)
    return frozenset(" ".join(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1))


def pairs(texts: Sequence[str], similarity: float) -> list[tuple[int, int, float]]:
    """Pairs (earlier, later, Jaccard) of texts at least `similarity` alike; equal input gives equal output.

    A row that has more than 64 candidates is compared with the earliest of them, so a large group of copies is
    connected through its first rows and not pair by pair.
    """
    from rensa import RMinHash, RMinHashLSH

    sets = [shingles(text) for text in texts]
    hashes = RMinHash.from_token_sets([sorted(one) for one in sets], PERMUTATIONS, SEED)
    index = RMinHashLSH(similarity, PERMUTATIONS, 16 if similarity >= 0.85 else 32)
    found = []
    for later, (one, minhash) in enumerate(zip(sets, hashes, strict=True)):
        if not one:
            continue
        for earlier in sorted(index.query(minhash))[:MOST_CANDIDATES]:
            other = sets[earlier]
            if min(len(one), len(other)) < similarity * max(len(one), len(other)):
                continue
            shared = len(one & other)
            jaccard = shared / (len(one) + len(other) - shared)
            if jaccard >= similarity:
                found.append((earlier, later, jaccard))
        index.insert(later, minhash)
    return found


def clusters(count: int, linked: Sequence[tuple[int, int, float]]) -> list[int]:
    """For each of `count` rows the smallest row number it is connected with."""
    parent = list(range(count))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for one, other, _ in linked:
        a, b = root(one), root(other)
        parent[max(a, b)] = min(a, b)
    return [root(row) for row in range(count)]
