"""Sticky splits: a row that was assigned keeps its split for ever, and near-duplicates never stand in two splits.

New clusters of near-duplicates are ordered by a salted hash and fill, label by label, the split that lacks most of
its share. A new row that is close to rows of two different splits is held out, so neither side leaks.
"""

import hashlib
from collections import Counter, defaultdict

import pandas as pd

from ft_assets.data.near_duplicates import clusters, pairs
from ft_assets.tasks import SplitSpec

HELD_OUT = "held_out"
COLUMNS = ["row_id", "cluster_id", "split", "label", "present"]


def assign(kept: pd.DataFrame, spec: SplitSpec, previous: pd.DataFrame | None) -> pd.DataFrame:
    """Every row's cluster and split.

    Args:
        kept: Clean rows: row_id, text, label, event_time.
        previous: An earlier result; its rows keep their splits, also while they are absent (`present` False).

    Returns:
        Columns row_id, cluster_id, split (train, validation, test, held_out), label, present.
    """
    rows = kept[["row_id", "text", "label", "event_time"]].sort_values("row_id", ignore_index=True)
    known = {} if previous is None else previous.set_index("row_id")[["cluster_id", "split"]].to_dict("index")
    near = pairs(rows["text"].tolist(), spec.cluster_similarity)
    ids = rows["row_id"].tolist()
    split: dict[str, str] = {key: known[key]["split"] for key in ids if key in known}
    cluster: dict[str, str] = {key: known[key]["cluster_id"] for key in ids if key in known}
    _hold_out_old_pairs(near, ids, split)
    members: dict[int, list[int]] = defaultdict(list)
    for row, root in enumerate(clusters(len(rows), near)):
        members[root].append(row)
    new: list[list[int]] = []
    for group in members.values():
        fresh = [row for row in group if ids[row] not in known]
        if not fresh:
            continue
        taken = {split[ids[row]] for row in group if ids[row] in known} - {HELD_OUT}
        names = sorted(cluster[ids[row]] for row in group if ids[row] in known)
        for row in fresh:
            cluster[ids[row]] = names[0] if names else ids[group[0]]
            if len(taken) == 1:
                split[ids[row]] = next(iter(taken))
            elif names:
                split[ids[row]] = HELD_OUT
        if not names:
            new.append(group)
    _fill(new, rows, spec, split, cluster, known, previous)
    result = rows[["row_id", "label"]].assign(
        cluster_id=[cluster[key] for key in ids], split=[split[key] for key in ids], present=True
    )[COLUMNS]
    if previous is None:
        return result
    absent = previous[~previous["row_id"].isin(ids)].assign(present=False)[COLUMNS]
    return pd.concat([result, absent], ignore_index=True) if len(absent) else result


def leaks(rows: pd.DataFrame, similarity: float) -> list[tuple[str, str, float]]:
    """Pairs of rows in different splits that are at least `similarity` alike: (row id, row id, Jaccard).

    Args:
        rows: row_id, text and split (train, validation or test).
    """
    ordered = rows.sort_values("row_id", ignore_index=True)
    splits, ids = ordered["split"].tolist(), ordered["row_id"].tolist()
    near = pairs(ordered["text"].tolist(), similarity)
    return [(ids[a], ids[b], jaccard) for a, b, jaccard in near if splits[a] != splits[b]]


def _hold_out_old_pairs(near: list[tuple[int, int, float]], ids: list[str], split: dict[str, str]) -> None:
    """Old rows that read alike only since the cleaning changed: the one nearer to training is held out."""
    order = ("train", "validation", "test")
    for a, b, _ in near:
        one, other = split.get(ids[a], HELD_OUT), split.get(ids[b], HELD_OUT)
        if one != other and HELD_OUT not in (one, other):
            split[ids[a] if order.index(one) < order.index(other) else ids[b]] = HELD_OUT


def _fill(
    new: list[list[int]],
    rows: pd.DataFrame,
    spec: SplitSpec,
    split: dict[str, str],
    cluster: dict[str, str],
    known: dict[str, dict[str, str]],
    previous: pd.DataFrame | None,
) -> None:
    ids, labels = rows["row_id"].tolist(), rows["label"].tolist()
    shares = {"test": spec.test, "validation": spec.validation, "train": 1 - spec.test - spec.validation}
    if spec.method == "time":
        times = rows["event_time"].tolist()
        latest = sorted(new, key=lambda group: (max(times[row] for row in group), ids[group[0]]), reverse=True)
        wanted, total = spec.test * sum(map(len, new)), 0
        while latest and total < wanted:
            group = latest.pop(0)
            total += len(group)
            split.update({ids[row]: "test" for row in group})
        new = [group for group in new if ids[group[0]] not in split]
        shares = {"validation": spec.validation / (1 - spec.test), "train": 1 - spec.validation / (1 - spec.test)}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    if previous is not None:
        for label, where in zip(previous["label"], previous["split"], strict=True):
            counts[label][where] += 1
    for group in sorted(new, key=lambda group: hashlib.sha256(f"{spec.salt}:{cluster[ids[group[0]]]}".encode()).digest()):
        label = Counter(labels[row] for row in group).most_common(1)[0][0]
        have = counts[label]
        total = sum(have[name] for name in shares) + len(group)
        where = max(shares, key=lambda name: shares[name] * total - have[name])
        have[where] += len(group)
        split.update({ids[row]: where for row in group})
