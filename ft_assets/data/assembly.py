"""Putting rows together again from the digests that assets pass on."""

from collections.abc import Sequence

import pandas as pd

from ft_resources.errors import TrainingError
from ft_resources.lake import Lake


def split_rows(lake: Lake, split_digest: str) -> pd.DataFrame:
    """The clean rows of one split, in row id order.

    Args:
        split_digest: Of a `train_split`, `validation_split` or `test_split` artefact.

    Returns:
        The columns of `clean_dataset`'s kept rows; the order depends on content alone.
    """
    split = lake.open(split_digest)
    clean = lake.open(split.made_from["clean_dataset"])
    members = split.parquet("rows.parquet")["row_id"]
    rows = clean.parquet("kept.parquet")
    return rows[rows["row_id"].isin(set(members))].sort_values("row_id", ignore_index=True)


def require_labels(training: pd.DataFrame, labels: Sequence[str]) -> None:
    """Check that there are training rows, and some of every label.

    Raises:
        TrainingError: There are none, or none of a label.
    """
    missing = [label for label in labels if label not in set(training["label"])]
    if training.empty or missing:
        raise TrainingError(
            f"there are no training rows for {missing or list(labels) or 'this task'}",
            where="train_split",
            mend="Add labelled rows for them, or remove these labels from the task.",
        )
