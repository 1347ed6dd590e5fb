"""Sticky splits: a row that was assigned keeps its split for ever, and near-duplicates never stand in two splits.

New clusters of near-duplicates are dealt out label by label. Large clusters go first, equal ones in the order of a
salted hash, each to the split whose quotient (rows it has of this label, plus the cluster) / share is the least: the
highest-averages rule of d'Hondt. What a split has already counts, so shares hold over any number of calls, and once a
label has 1 / (smallest share) clusters every split has some of it, ten for the default shares.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from ft_assets.data.near_duplicates import Hashes, Pair, clusters, hashed, jaccard, near_pairs, pairs
from ft_assets.tasks import SplitSpec
from ft_resources.errors import DataError

SPLITS = ("train", "validation", "test")
HELD_OUT = "held_out"
COLUMNS = ["row_id", "cluster_id", "split", "label", "event_time", "present"]
LARGEST_CONFLICT = 1_000
"""A larger group of rows that reads like two splits is held out without looking at each pair."""

Group = list[int]


def assign(kept: pd.DataFrame, spec: SplitSpec, previous: pd.DataFrame | None) -> pd.DataFrame:
    """Every row's cluster and split.

    A new row that is near rows of one split joins it; near rows of two splits it is held out, and neither side leaks.
    An old row changes only when its text no longer reads as it did, or an absent one comes back, and it now is near a
    row of another split: then the one that stands nearer to training is held out.

    Args:
        kept: Clean rows: row_id (distinct), text, label, event_time. The result does not depend on their order.
        spec: Shares, method and similarity. With method time the latest new clusters go to the test split.
        previous: An earlier result under the same `spec`; its rows keep their splits, also while they are absent
            (`present` False).

    Returns:
        Columns row_id, cluster_id, split (train, validation, test, held_out), label, event_time, present; present rows
        first, in row id order. Small data can leave a split without rows.

    Raises:
        DataError: A row id stands twice.
    """
    rows = kept[["row_id", "text", "label", "event_time"]].sort_values("row_id", ignore_index=True)
    ids = rows["row_id"].tolist()
    if len(set(ids)) < len(ids):
        raise DataError("a row id stands twice in the clean rows", where="splits", mend="Clean the rows first.")
    places = {key: at for at, key in enumerate(ids)}
    split: dict[int, str] = {}
    cluster: dict[int, str] = {}
    if previous is not None:
        for key, name, where in zip(previous["row_id"], previous["cluster_id"], previous["split"], strict=True):
            if key in places:
                split[places[key]], cluster[places[key]] = where, name
    contents = hashed(rows["text"].tolist())
    near = _settle_old(contents, split, spec.cluster_similarity)
    roots = clusters(len(ids), near)
    groups: dict[int, Group] = defaultdict(list)
    for at, root in enumerate(roots):
        groups[root].append(at)
    fresh: list[Group] = []
    for group in groups.values():
        new = [at for at in group if at not in split]
        taken = {split[at] for at in group if at in split} - {HELD_OUT}
        if new and len(taken) > 1:
            apart = _part(group, new, contents, spec.cluster_similarity, split=split, cluster=cluster, ids=ids)
            cluster.update((at, ids[loose[0]]) for loose in apart for at in loose)
            fresh += apart
        elif new and taken:
            name = min(cluster[at] for at in group if at in cluster)
            for at in new:
                split[at], cluster[at] = next(iter(taken)), name
        elif new:
            cluster.update(dict.fromkeys(new, ids[new[0]]))
            fresh.append(new)
    _deal(fresh, rows, spec, split, cluster)
    result = rows[["row_id", "label"]].assign(
        event_time=_utc(rows["event_time"]),
        cluster_id=[cluster[at] for at in range(len(ids))],
        split=[split[at] for at in range(len(ids))],
        present=True,
    )[COLUMNS]
    if previous is None:
        return result
    absent = previous[~previous["row_id"].isin(ids)].reindex(columns=COLUMNS).assign(present=False)
    absent = absent.assign(event_time=_utc(absent["event_time"])).sort_values("row_id")
    return pd.concat([result, absent], ignore_index=True) if len(absent) else result


def leaks(rows: pd.DataFrame, similarity: float) -> list[tuple[str, str, float]]:
    """Pairs of rows in different splits that are at least `similarity` alike: (row id, row id, Jaccard).

    Of many copies of one text not every pair is listed, but there is a pair wherever a group of near-duplicates stands
    in two splits. Held out rows cannot leak and are not looked at.

    Args:
        rows: row_id, text and split.
    """
    ordered = rows[rows["split"].isin(SPLITS)].sort_values("row_id", ignore_index=True)
    splits, ids = ordered["split"].tolist(), ordered["row_id"].tolist()
    near = pairs(ordered["text"].tolist(), similarity)
    return [(ids[a], ids[b], score) for a, b, score in near if splits[a] != splits[b]]


def _settle_old(contents: Sequence[Hashes], split: dict[int, str], similarity: float) -> list[Pair]:
    """The near pairs of all rows that are not held out, after no two old rows of different splits are near."""
    while True:
        active = [at for at in range(len(contents)) if split.get(at) != HELD_OUT]
        near = [
            (active[a], active[b], score) for a, b, score in near_pairs([contents[at] for at in active], similarity)
        ]
        crossing = [(a, b) for a, b, _ in near if a in split and b in split and split[a] != split[b]]
        if not crossing:
            return near
        for a, b in crossing:
            if HELD_OUT not in (split[a], split[b]):
                split[min(a, b, key=lambda at: SPLITS.index(split[at]))] = HELD_OUT


def _part(
    group: Group,
    new: Group,
    contents: Sequence[Hashes],
    similarity: float,
    *,
    split: dict[int, str],
    cluster: dict[int, str],
    ids: Sequence[str],
) -> list[Group]:
    """Divide the new rows of a group that touches two splits: outwards from the old rows, those in between held out.

    Returns:
        Clusters of new rows that hung on a row held out only: near no split, they can go to any.
    """
    if len(group) > LARGEST_CONFLICT:
        for at in new:
            split[at], cluster[at] = HELD_OUT, ids[at]
        return []
    undecided = set(new)
    reached = [at for at in group if at in split]
    while reached:
        touched: dict[int, Group] = defaultdict(list)
        for at in sorted(undecided):
            touched[at] = [other for other in reached if jaccard(contents[at], contents[other]) >= similarity]
        reached = []
        for at in (at for at, others in touched.items() if others):
            around = [other for other in group if other in split and split[other] != HELD_OUT]
            around = [other for other in around if jaccard(contents[at], contents[other]) >= similarity]
            names = {split[other] for other in around}
            undecided.discard(at)
            if len(names) == 1:
                split[at], cluster[at] = names.pop(), min(cluster[other] for other in around)
                reached.append(at)
            else:
                split[at], cluster[at] = HELD_OUT, ids[at]
    loose = sorted(undecided)
    apart: dict[int, Group] = defaultdict(list)
    for at, root in zip(
        loose, clusters(len(loose), near_pairs([contents[at] for at in loose], similarity)), strict=True
    ):
        apart[root].append(at)
    return list(apart.values())


def _deal(
    fresh: list[Group], rows: pd.DataFrame, spec: SplitSpec, split: dict[int, str], cluster: dict[int, str]
) -> None:
    shares = {"train": 1 - spec.test - spec.validation, "test": spec.test, "validation": spec.validation}
    if spec.method == "time":
        fresh = _deal_latest(fresh, rows["event_time"], spec, split, cluster)
        del shares["test"]
    labels = rows["label"].tolist()
    have: dict[str, Counter[str]] = defaultdict(Counter)
    for at, where in split.items():
        have[labels[at]][where] += 1
    rank = _hash_rank(spec.salt, cluster)
    for group in sorted(fresh, key=lambda group: (-len(group), rank(group))):
        votes = Counter(labels[at] for at in group)
        label = min(votes, key=lambda name: (-votes[name], str(name)))
        split.update(dict.fromkeys(group, _neediest(have[label], shares, len(group))))
        have[label][split[group[0]]] += len(group)


def _neediest(have: Mapping[str, int], shares: Mapping[str, float], size: int) -> str:
    return min(shares, key=lambda name: (have.get(name, 0) + size) / shares[name])


def _deal_latest(
    fresh: list[Group], times: pd.Series, spec: SplitSpec, split: dict[int, str], cluster: dict[int, str]
) -> list[Group]:
    """Put the latest new clusters into the test split; the others are returned.

    A cluster counts by its latest row, one without any time as the oldest. The test split gets what it lacks of its
    share of all rows, but of the new rows never more than the share rounded up; clusters too large for that are passed
    over.
    """
    new_rows = sum(map(len, fresh))
    assigned = sum(where in SPLITS for where in split.values())
    has = sum(where == "test" for where in split.values())
    lacks = round(spec.test * (assigned + new_rows)) - has
    wanted = min(lacks, math.ceil(spec.test * new_rows))
    stamps = _utc(times).astype("int64").tolist()  # NaT is the least integer
    rank = _hash_rank(spec.salt, cluster)
    rest: list[Group] = []
    for group in sorted(fresh, key=lambda group: (-max(stamps[at] for at in group), rank(group))):
        if len(group) <= wanted:
            split.update(dict.fromkeys(group, "test"))
            wanted -= len(group)
        else:
            rest.append(group)
    return rest


def _utc(times: pd.Series) -> pd.Series:
    return pd.to_datetime(times, utc=True).astype("datetime64[us, UTC]")


def _hash_rank(salt: str, cluster: Mapping[int, str]) -> Callable[[Sequence[int]], bytes]:
    return lambda group: hashlib.sha256(f"{salt}:{cluster[group[0]]}".encode()).digest()
