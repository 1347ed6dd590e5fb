"""What must hold of rows before they are trained on: pure, asked by checks and again by `release`."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from bento.preparation import find
from ft_assets.data.rows import ROW_COLUMNS, row_id
from ft_assets.data.splits import leaks
from ft_assets.tasks import TaskSpec

SHOWN = 20


@dataclass(frozen=True)
class Verdict:
    """Whether a demand holds, in a sentence with the figures; `rows` are examples for a table."""

    passed: bool
    reason: str
    rows: list[dict[str, Any]] = field(default_factory=list)


def of_raw(rows: pd.DataFrame, task: TaskSpec) -> dict[str, Verdict]:
    """schema_valid, enough_rows, labels_known of a raw snapshot."""
    wrong = list(rows.columns) != ROW_COLUMNS
    sample = rows.head(1000)
    bad_ids = 0 if wrong else int((sample["text"].map(row_id) != sample["row_id"]).sum())
    schema = "columns are as agreed" if not wrong else f"the columns are {list(rows.columns)}"
    needed = f"{len(rows)} rows, at least {task.cleaning.min_rows} are needed"
    enough = len(rows) >= task.cleaning.min_rows
    unknown = rows.loc[rows["label"].notna() & ~rows["label"].isin(task.labels), ["label", "source"]]
    found = [
        {
            "label": label,
            "rows": len(group),
            "first": group["source"].iloc[0],
            "nearest": next(iter(difflib.get_close_matches(str(label), task.labels, n=1)), "-"),
        }
        for label, group in unknown.groupby("label")
    ]
    first = f"; '{found[0]['label']}' at {found[0]['first']}" if found else ""
    return {
        "schema_valid": Verdict(
            not wrong and not bad_ids, schema + (f"; {bad_ids} row ids are wrong" if bad_ids else "")
        ),
        "enough_rows": Verdict(enough, needed + ("" if enough else ". Add rows, or lower cleaning.min_rows")),
        "labels_known": Verdict(
            not found,
            f"{len(unknown)} rows carry a label that the task's `labels` do not list{first}"
            + (". Correct those rows or add the label to the task" if found else ""),
            found,
        ),
    }


def of_clean(kept: pd.DataFrame, task: TaskSpec) -> dict[str, Verdict]:
    """no_pii_left of clean rows."""
    kinds = task.cleaning.pii
    left = [(key, hit[0]) for key, text in zip(kept["row_id"], kept["text"], strict=True) for hit in find(text, kinds)]
    return {
        "no_pii_left": Verdict(
            not left,
            f"{len(left)} personal data left in {len(kept)} rows (kinds looked for: {', '.join(kinds) or 'none'})",
            [{"row_id": key, "kind": kind} for key, kind in left[:SHOWN]],
        )
    }


def of_splits(kept: pd.DataFrame, parts: Mapping[str, pd.DataFrame], task: TaskSpec) -> dict[tuple[str, str], Verdict]:
    """(split, demand): no_leakage of train, every_class_present of each split.

    Args:
        kept: Clean rows.
        parts: Split name to its rows (row_id).
    """
    where = {key: split for split, rows in parts.items() for key in rows["row_id"]}
    frame = kept.assign(split=kept["row_id"].map(where)).dropna(subset=["split"])
    leaking = leaks(frame, task.split.cluster_similarity)
    twice = sum(len(rows) for rows in parts.values()) - len(where)
    verdicts = {
        ("train", "no_leakage"): Verdict(
            not leaking and not twice,
            f"{twice} rows stand in two splits, {len(leaking)} pairs of near-copies cross splits",
            [{"a": a, "b": b, "jaccard": j} for a, b, j in leaking[:SHOWN]],
        )
    }
    for split in parts:
        counts = frame.loc[frame["split"] == split, "label"].value_counts().reindex(task.labels, fill_value=0)
        missing = [label for label, rows in counts.items() if rows == 0]
        verdicts[split, "every_class_present"] = Verdict(
            not missing,
            f"no rows of {missing} in the {split} split. Add rows of these labels"
            if missing
            else f"every label has at least {counts.min()} rows",
            [{"label": label, "rows": int(rows)} for label, rows in counts.items()],
        )
    return verdicts
