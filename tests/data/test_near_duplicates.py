import os
import random
import subprocess
import sys
import time
from itertools import combinations

import pandas as pd
import pytest

from bento.preparation import prepare
from ft_assets.data.near_duplicates import band_rows, clusters, hashed, jaccard, pairs, shingles

ORDER = (
    "Dear customer number {} your blue bicycle from our shop in town was shipped today and arrives soon at your door"
)


def exact(texts: list[str], similarity: float) -> set[tuple[int, int]]:
    sets = [shingles(text) for text in texts]
    return {
        (a, b)
        for a, b in combinations(range(len(texts)), 2)
        if min(len(sets[a]), len(sets[b])) >= similarity * max(len(sets[a]), len(sets[b]))
        and len(sets[a] & sets[b]) >= similarity * len(sets[a] | sets[b])
    }


def drifted(count: int, share: float) -> list[str]:
    """`count` texts of sixty words, and after them the same with about `share` of the words replaced."""
    draw = random.Random(7)
    words = [f"w{n}" for n in range(3_000)]
    texts = [[draw.choice(words) for _ in range(60)] for _ in range(count)]
    edited = [[draw.choice(words) if draw.random() < share else word for word in text] for text in texts]
    return [" ".join(text) for text in texts + edited]


@pytest.mark.parametrize(("similarity", "share"), [(0.3, 0.2), (0.5, 0.12), (0.7, 0.06), (0.9, 0.02)])
def test_pairs_are_those_of_brute_force(similarity: float, share: float) -> None:
    texts = drifted(300, share)
    found = pairs(texts, similarity)
    assert {(a, b) for a, b, _ in found} == exact(texts, similarity)
    assert len(found) > 50
    rows = hashed(texts)
    assert all(score == jaccard(rows[a], rows[b]) >= similarity for a, b, score in found)


@pytest.mark.parametrize("similarity", [0.7, 0.9])
def test_recall_on_real_mails(real_mails: pd.DataFrame, similarity: float) -> None:
    texts = [prepare(text, ["email", "phone"], 2_000)[0] for text in real_mails["text"].sample(1_000, random_state=3)]
    near = exact(texts, similarity)
    names = clusters(len(texts), pairs(texts, similarity))
    assert len(near) > 20
    assert sum(names[a] == names[b] for a, b in near) >= 0.99 * len(near)


def test_every_threshold_has_bands_that_propose_it() -> None:
    for similarity in (0.05, 0.3, 0.5, 0.7, 0.9, 1.0):
        rows = band_rows(similarity)
        assert 1 - (1 - similarity**rows) ** (128 // rows) >= 0.99
    assert [band_rows(s) for s in (0.5, 0.7, 0.9)] == sorted(band_rows(s) for s in (0.5, 0.7, 0.9))


def test_thousands_of_rows_alike_are_chained_not_paired() -> None:
    texts = [ORDER.format(n) for n in range(2_000)] + ["a quite different letter about nothing in particular"]
    started = time.process_time()
    found = pairs(texts, 0.6)
    assert time.process_time() - started < 5
    names = clusters(len(texts), found)
    assert set(names[:-1]) == {0}
    assert names[-1] == 2_000
    assert len(found) < 10 * len(texts)


def test_copies_are_linked_to_the_first() -> None:
    assert pairs(["Is it on? Yes, it is on!"] * 4, 0.9) == [(0, 1, 1.0), (0, 2, 1.0), (0, 3, 1.0)]


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("今天天气很好我们一起去公园玩吧大家都来", "今天天气很好我们一起去公园玩吧大家都去", True),
        ("今天天气很好我们一起去公园玩吧大家都来", "请把上个月的发票寄到新的办公室地址谢谢", False),
        ("Call me now", "call me, NOW!", True),
        ("call me now", "pay me then", False),
        ("!!!", "!!!", True),
        ("!!!", "???", False),
        ("", "hello there", False),
    ],
)
def test_scripts_without_blanks_and_short_texts(one: str, other: str, near: bool) -> None:
    assert bool(pairs([one, other], 0.7)) is near


def test_every_process_finds_the_same() -> None:
    script = (
        "from ft_assets.data.near_duplicates import pairs\n"
        "print(pairs([' '.join(f'w{n + k % (2 + n // 7)}' for k in range(30)) for n in range(120)], .3))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) > 100


def test_nothing_to_compare() -> None:
    assert pairs([], 0.7) == []
    assert pairs(["alone"], 0.7) == []
    assert clusters(0, []) == []
