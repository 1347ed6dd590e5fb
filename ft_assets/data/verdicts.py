"""What must hold of rows before they are trained on: pure, asked by checks and again by `release`."""

from collections.abc import Mapping

import pandas as pd

from bento.preparation import find
from ft_assets.data.forms import SHOWN, Verdict, form_of
from ft_assets.data.rows import ROW_COLUMNS, row_id
from ft_assets.data.splits import leaks
from ft_assets.tasks import TaskSpec


def of_raw(rows: pd.DataFrame, task: TaskSpec) -> dict[str, Verdict]:
    """schema_valid, enough_rows, labels_known of a raw snapshot."""
    wrong = list(rows.columns) != ROW_COLUMNS
    sample = rows.head(1000)
    bad_ids = 0 if wrong else int((sample["text"].map(row_id) != sample["row_id"]).sum())
    schema = "columns are as agreed" if not wrong else f"the columns are {list(rows.columns)}"
    needed = f"{len(rows)} rows, at least {task.cleaning.min_rows} are needed"
    enough = len(rows) >= task.cleaning.min_rows
    return {
        "schema_valid": Verdict(
            not wrong and not bad_ids, schema + (f"; {bad_ids} row ids are wrong" if bad_ids else "")
        ),
        "enough_rows": Verdict(enough, needed + ("" if enough else ". Add rows, or lower cleaning.min_rows")),
        "labels_known": form_of(task).known(rows),
    }


def of_clean(kept: pd.DataFrame, task: TaskSpec) -> dict[str, Verdict]:
    """no_pii_left of clean rows."""
    kinds = task.cleaning.pii
    form = form_of(task)
    left = [
        (key, hit[0])
        for key, text, answer in zip(kept["row_id"], kept["text"], kept["label"], strict=True)
        for content in form.contents(text, answer)
        for hit in find(content, kinds)
    ]
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
    form = form_of(task)
    where = {key: split for split, rows in parts.items() for key in rows["row_id"]}
    frame = kept.assign(split=kept["row_id"].map(where)).dropna(subset=["split"])
    leaking = leaks(frame.assign(text=frame["text"].map(form.compared)), task.split.cluster_similarity)
    twice = sum(len(rows) for rows in parts.values()) - len(where)
    verdicts = {
        ("train", "no_leakage"): Verdict(
            not leaking and not twice,
            f"{twice} rows stand in two splits, {len(leaking)} pairs of near-copies cross splits",
            [{"a": a, "b": b, "jaccard": j} for a, b, j in leaking[:SHOWN]],
        )
    }
    for split in parts:
        part = frame.loc[frame["split"] == split, "label"]
        verdicts[split, "every_class_present"] = form.present(frame["label"], part, split)
    return verdicts
