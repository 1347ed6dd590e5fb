import random
from itertools import combinations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bento.preparation import prepare
from ft_assets.data.near_duplicates import hashed, jaccard
from ft_assets.data.rows import row_id
from ft_assets.data.splits import HELD_OUT, SPLITS, assign, leaks
from ft_assets.tasks import SplitSpec
from ft_resources.errors import DataError

DAY = pd.Timestamp("2024-01-01", tz="UTC")


def rows(texts: list[str], labels: list[str] | None = None, days: list[int | None] | None = None) -> pd.DataFrame:
    times = [pd.NaT if day is None else DAY + pd.Timedelta(days=day) for day in (days or [0] * len(texts))]
    return pd.DataFrame(
        {
            "row_id": [row_id(text) for text in texts],
            "text": texts,
            "label": labels or ["ham"] * len(texts),
            "event_time": pd.Series(times, dtype="datetime64[us, UTC]"),
        }
    )


def unlike(count: int, name: str = "t") -> list[str]:
    return [" ".join(f"{name}{n}w{k}" for k in range(12)) for n in range(count)]


def words(name: str, count: int = 40) -> str:
    return " ".join(f"{name}{k}" for k in range(count))


def by_text(kept: pd.DataFrame, assigned: pd.DataFrame) -> list[str]:
    return kept["row_id"].map(assigned.set_index("row_id")["split"]).tolist()


# Chains: each text shares most of its words with the next, so clusters meet, grow and bridge as rows arrive.
POOL = [" ".join(f"c{chain}w{start + k}" for k in range(24)) for chain in range(5) for start in range(0, 30, 3)]


@settings(deadline=None, max_examples=60)
@given(
    order=st.permutations(POOL),
    cuts=st.lists(st.integers(0, len(POOL)), max_size=6),
    method=st.sampled_from(["hash", "time"]),
    similarity=st.sampled_from([0.4, 0.6]),
)
def test_rows_keep_their_split_in_any_order_and_any_batches(
    order: list[str], cuts: list[int], method: str, similarity: float
) -> None:
    spec = SplitSpec(method=method, cluster_similarity=similarity, test=0.3, validation=0.3)
    previous: pd.DataFrame | None = None
    known: dict[str, str] = {}
    for end in [*sorted(cuts), len(order)]:
        kept = rows(order[:end], [text[1] for text in order[:end]], [len(text) % 7 for text in order[:end]])
        previous = assign(kept, spec, previous)
        now = previous.set_index("row_id")["split"].to_dict()
        assert set(now) == set(kept["row_id"])
        assert {key: now[key] for key in known} == known
        known = now
    contents = hashed(order)
    for a, b in combinations(range(len(order)), 2):
        one, other = (known[row_id(order[at])] for at in (a, b))
        if one != other and HELD_OUT not in (one, other):
            assert jaccard(contents[a], contents[b]) < similarity
    assert leaks(kept.assign(split=by_text(kept, previous)), similarity) == []


def test_order_of_rows_does_not_matter() -> None:
    kept = rows(unlike(60), ["ham", "spam"] * 30)
    pd.testing.assert_frame_equal(
        assign(kept, SplitSpec(), None), assign(kept.sample(frac=1, random_state=1), SplitSpec(), None)
    )


def test_copies_of_one_text_share_a_cluster_and_a_split() -> None:
    kept = rows([*unlike(20), *(f"{words('news')} issue {n}" for n in range(9))])
    assigned = assign(kept, SplitSpec(), None)
    family = assigned[assigned["row_id"].isin(kept["row_id"][20:])]
    assert family["cluster_id"].nunique() == 1
    assert family["split"].nunique() == 1
    assert family["cluster_id"].iloc[0] == family["row_id"].min()


@pytest.mark.parametrize("salt", ["", "a", "b", "c", "d"])
@pytest.mark.parametrize("large", [1, 200])
def test_ten_clusters_of_a_label_reach_every_split(salt: str, large: int) -> None:
    texts = unlike(9, "ham") + [f"{words('template')} number {n}" for n in range(large)] + unlike(300, "spam")
    kept = rows(texts, ["ham"] * (9 + large) + ["spam"] * 300)
    assigned = assign(kept, SplitSpec(salt=salt), None)
    for label in ("ham", "spam"):
        assert set(assigned.loc[assigned["label"] == label, "split"]) == set(SPLITS)
    shares = assigned.loc[assigned["label"] == "spam", "split"].value_counts(normalize=True)
    assert shares.to_dict() == pytest.approx({"train": 0.7, "test": 0.2, "validation": 0.1}, abs=0.01)


def test_shares_hold_over_many_small_batches() -> None:
    texts, previous = unlike(100), None
    for end in range(1, 101):
        previous = assign(rows(texts[:end]), SplitSpec(), previous)
    assert previous["split"].value_counts().to_dict() == {"train": 70, "test": 20, "validation": 10}


def test_another_salt_draws_other_splits() -> None:
    kept = rows(unlike(100))
    one, other = (by_text(kept, assign(kept, SplitSpec(salt=salt), None)) for salt in ("one", "other"))
    assert one != other


def given_splits(kept: pd.DataFrame, splits: list[str]) -> pd.DataFrame:
    return kept[["row_id", "label", "event_time"]].assign(cluster_id=kept["row_id"], split=splits, present=True)


def test_bridge_between_two_splits_is_held_out_and_both_sides_stay_open() -> None:
    left, right = words("l"), words("r")
    spec = SplitSpec(cluster_similarity=0.4)
    kept = rows([left, right])
    previous = given_splits(kept, ["train", "test"])
    kept = rows([left, right, f"{left} {right}"])
    previous = assign(kept, spec, previous)
    assert by_text(kept, previous) == ["train", "test", HELD_OUT]
    kept = rows([left, right, f"{left} {right}", f"{left} more", f"{right} more"])
    previous = assign(kept, spec, previous)
    assert by_text(kept, previous) == ["train", "test", HELD_OUT, "train", "test"]


def test_only_the_rows_in_between_are_held_out_when_a_chain_arrives_at_once() -> None:
    chain = [" ".join(f"w{start + k}" for k in range(24)) for start in range(0, 40, 4)]
    spec = SplitSpec(cluster_similarity=0.6)
    previous = given_splits(rows([chain[0], chain[-1]]), ["train", "test"])
    kept = rows(chain)
    splits = by_text(kept, assign(kept, spec, previous))
    held = [at for at, split in enumerate(splits) if split == HELD_OUT]
    assert 1 <= len(held) <= 2
    assert splits[: held[0]] == ["train"] * held[0]
    assert set(splits[held[-1] + 1 :]) == {"test"}
    assert leaks(kept.assign(split=splits), 0.6) == []


def test_absent_rows_are_remembered() -> None:
    kept = rows(unlike(30))
    first = assign(kept, SplitSpec(), None)
    gone = assign(kept[10:], SplitSpec(), first)
    assert gone["present"].sum() == 20
    assert set(gone.loc[~gone["present"], "row_id"]) == set(kept["row_id"][:10])
    back = assign(kept, SplitSpec(), gone)
    assert back["present"].all()
    assert by_text(kept, back) == by_text(kept, first)


def test_row_that_comes_back_near_another_split_does_not_leak() -> None:
    text = words("w")
    kept = rows([text, f"{text} again"])
    previous = given_splits(kept, ["test", "train"]).assign(present=[False, True])
    splits = by_text(kept, assign(kept, SplitSpec(), previous))
    assert splits == ["test", HELD_OUT]


def test_time_puts_the_latest_clusters_into_the_test_split() -> None:
    texts = unlike(50)
    kept = rows(texts, days=list(range(50)))
    splits = by_text(kept, assign(kept, SplitSpec(method="time"), None))
    assert splits[40:] == ["test"] * 10
    assert splits[:40].count("validation") == 5


def test_time_keeps_a_cluster_together_and_rows_without_a_time_are_the_oldest() -> None:
    family = [f"{words('news')} issue {n}" for n in range(4)]
    texts = unlike(46) + family
    days: list[int | None] = [None] * 10 + list(range(36)) + [0, 1, 2, 99]
    kept = rows(texts, days=days)
    splits = by_text(kept, assign(kept, SplitSpec(method="time"), None))
    assert splits[46:] == ["test"] * 4
    assert splits[40:46] == ["test"] * 6
    assert "test" not in splits[:10]


def test_time_over_many_small_batches_fills_every_split() -> None:
    texts, previous = unlike(60), None
    for end in range(1, 61):
        previous = assign(rows(texts[:end], days=list(range(end))), SplitSpec(method="time"), previous)
    counts = previous["split"].value_counts()
    assert counts["test"] == 12
    assert counts["validation"] in (5, 6)


@pytest.mark.parametrize("method", ["hash", "time"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_small_data(method: str, count: int) -> None:
    assigned = assign(rows(unlike(count)), SplitSpec(method=method), None)
    assert len(assigned) == count
    assert set(assigned["split"]) <= set(SPLITS)


def test_row_id_that_stands_twice_is_refused() -> None:
    with pytest.raises(DataError, match="stands twice"):
        assign(rows(["the same text"] * 2), SplitSpec(), None)


def test_result_survives_parquet(tmp_path: object) -> None:
    kept = rows(unlike(20), days=[None, *range(19)])
    path = f"{tmp_path}/a.parquet"
    assign(kept[:15], SplitSpec(), None).to_parquet(path, index=False)
    again = assign(kept[5:], SplitSpec(), pd.read_parquet(path))
    assert list(again.columns) == ["row_id", "cluster_id", "split", "label", "event_time", "present"]
    assert str(again["event_time"].dtype) == "datetime64[us, UTC]"
    assert again["present"].tolist().count(False) == 5


def test_leaks_finds_copies_and_near_copies_and_overlooks_held_out_rows() -> None:
    text = words("w")
    frame = pd.DataFrame(
        {
            "row_id": ["a", "b", "c", "d", "e"],
            "text": [text, text, f"{text} more", words("v"), text],
            "split": ["train", "test", "validation", "test", HELD_OUT],
        }
    )
    found = leaks(frame, 0.7)
    assert ("a", "b", 1.0) in found
    assert any({"a", "c"} == {one, other} and 0.9 < score < 1 for one, other, score in found)
    assert not {"d", "e"} & {name for one, other, _ in found for name in (one, other)}


def test_real_mails_that_arrive_in_batches(real_mails: pd.DataFrame) -> None:
    mails = real_mails.sample(1_500, random_state=5).drop_duplicates("row_id")
    mails = mails.assign(text=[prepare(text, ["email", "phone", "url"], 2_000)[0] for text in mails["text"]])
    mails = mails[mails["text"].str.len() > 8].sort_values("event_time")
    previous: pd.DataFrame | None = None
    known: dict[str, str] = {}
    for end in (600, 900, 1_200, len(mails)):
        previous = assign(mails[:end], SplitSpec(), previous)
        now = previous.set_index("row_id")["split"].to_dict()
        assert {key: now[key] for key in known} == known
        known = now
    assert leaks(mails.assign(split=by_text(mails, previous)), 0.7) == []
    for label, part in previous.groupby("label"):
        shares = part["split"].value_counts(normalize=True)
        assert shares["test"] == pytest.approx(0.2, abs=0.02), label
        assert shares["validation"] == pytest.approx(0.1, abs=0.02), label
    assert (previous["split"] == HELD_OUT).mean() < 0.01
    scrambled = mails.assign(split=random.Random(2).choices(SPLITS, k=len(mails)))
    assert len(leaks(scrambled, 0.7)) > 50
