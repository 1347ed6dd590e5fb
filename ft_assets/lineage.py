"""Tracing: from an answer to the rows behind it, and from a row to the adapters and answers it went into."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from ft_assets.data.assembly import split_rows
from ft_resources.errors import ArtefactError, DataError
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger


@dataclass(frozen=True)
class Trace:
    """Everything behind one answer."""

    prediction: dict[str, Any]
    release: dict[str, Any] | None
    """The decision that made the adapter live; None for an answer of a Bento that runs on its own."""
    adapter: dict[str, Any]
    digests: dict[str, str]
    """Asset -> digest, from the adapter back to the raw snapshot."""
    rows: pd.DataFrame
    """The rows the adapter was trained on, with the source each was read from."""


def trace(lake: Lake, ledger: Ledger, prediction_id: str) -> Trace:
    """From an answer to its release, adapter and training rows.

    Raises:
        RequestError: `unknown_prediction`.
        ArtefactError: An artefact on the way is missing or damaged.
    """
    prediction = ledger.prediction(prediction_id)
    adapter = lake.open(prediction["adapter"])
    train = adapter.made_from["train_split"]
    clean = lake.open(train).made_from["clean_dataset"]
    releases = {one["id"]: one for one in ledger.releases(prediction["task"])}
    return Trace(
        prediction={key: value for key, value in prediction.items() if key != "embedding"},
        release=releases.get(prediction["release_id"]),
        adapter=adapter.json("adapter.json"),
        digests={
            "adapter": adapter.digest,
            "train_split": train,
            "validation_split": adapter.made_from["validation_split"],
            "clean_dataset": clean,
            "raw_dataset": lake.open(clean).made_from["raw_dataset"],
        },
        rows=split_rows(lake, train),
    )


def trace_row(lake: Lake, ledger: Ledger, task: str, row_id: str) -> dict[str, Any]:
    """What became of a row: where it stands, whether it was rejected, its split, the released adapters trained on it.

    Raises:
        DataError: No such row in the newest snapshot of the task.
    """
    raw = lake.require(task, "raw_dataset").parquet("rows.parquet")
    found = raw[raw["row_id"] == row_id]
    if found.empty:
        raise DataError(
            f"task '{task}' has no row '{row_id}'", mend="Row ids stand in ft trace and in the eval report."
        )
    clean = lake.require(task, "clean_dataset")
    rejected = clean.parquet("rejected.parquet")
    assigned = lake.require(task, "assignments").parquet("assignments.parquet").set_index("row_id")["split"]
    adapters, seen = [], set()
    for release in ledger.releases(task):
        if release["adapter"] in seen:
            continue
        seen.add(release["adapter"])
        try:
            members = lake.open(lake.open(release["adapter"]).made_from["train_split"]).parquet("rows.parquet")
        except ArtefactError as error:
            adapters.append(
                {"adapter": release["adapter"], "version": release["model_version"], "unreadable": str(error)}
            )
            continue
        if (members["row_id"] == row_id).any():
            adapters.append(
                {"adapter": release["adapter"], "version": release["model_version"], "release": release["id"]}
            )
    return {
        "row_id": row_id,
        "sources": found["source"].tolist(),
        "labels": found["label"].tolist(),
        "rejected": rejected.loc[rejected["row_id"] == row_id, ["reason", "detail"]].to_dict("records"),
        "split": assigned.get(row_id),
        "trained": adapters,
    }
