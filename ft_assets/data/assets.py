"""Stage 1: raw rows as an immutable snapshot, cleaned rows with every rejection, sticky splits."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd

from ft_assets.data.cleaning import CLEANER_VERSION, clean
from ft_assets.data.forms import counted, form_of
from ft_assets.data.sources import read_sources
from ft_assets.data.splits import SPLITS, assign
from ft_assets.materialising import publish, result, table, task_named, typed_failures
from ft_assets.partitions import task_partitions
from ft_resources.environments import Environment
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger

GROUP = "1_data"


@dg.asset(partitions_def=task_partitions, group_name=GROUP, kinds={"parquet"}, code_version="1")
def raw_dataset(
    context: dg.AssetExecutionContext,
    environment: dg.ResourceParam[Environment],
    lake: dg.ResourceParam[Lake],
    ledger: dg.ResourceParam[Ledger],
) -> dg.MaterializeResult[Any]:
    """Snapshot of every source of the task: row id, text, label, where it stands, when it came into being."""
    with typed_failures():
        task = task_named(environment, context.partition_key)
        rows = read_sources(
            task.spec,
            task.path.parent,
            environment.packages,
            lambda: ledger.feedback_rows(task.name),
            context.log.info,
        )

        def write(folder: Path) -> None:
            rows.to_parquet(folder / "rows.parquet", index=False)

        content = pd.util.hash_pandas_object(rows, index=False).to_numpy().tobytes()
        sources = [source.model_dump(mode="json") for source in task.spec.sources]
        made_from = {"task": task.name, "sources": sources, "rows": hashlib.sha256(content).hexdigest()}
        snapshot = publish(context, lake, (task.name, "raw_dataset"), "raw_dataset", made_from, write)
        return result(
            snapshot,
            {
                "rows": len(rows),
                "labels": table(form_of(task.spec).overview(rows["label"])),
                "origins": table(counted(rows["origin"], "origin")),
                "first_event": str(rows["event_time"].min()),
                "last_event": str(rows["event_time"].max()),
            },
        )


@dg.asset(
    partitions_def=task_partitions,
    deps=[raw_dataset],
    group_name=GROUP,
    kinds={"parquet"},
    code_version=CLEANER_VERSION,
)
def clean_dataset(
    context: dg.AssetExecutionContext, environment: dg.ResourceParam[Environment], lake: dg.ResourceParam[Lake]
) -> dg.MaterializeResult[Any]:
    """Rows that are kept, personal data masked; and every rejected row with its reason."""
    with typed_failures():
        task = task_named(environment, context.partition_key)
        raw = lake.require(task.name, "raw_dataset")
        form = form_of(task.spec)

        def write(folder: Path) -> None:
            cleaned = clean(raw.parquet("rows.parquet"), task.spec.cleaning, form)
            cleaned.kept.to_parquet(folder / "kept.parquet", index=False)
            cleaned.rejected.to_parquet(folder / "rejected.parquet", index=False)
            (folder / "counts.json").write_text(json.dumps({"truncated": cleaned.truncated}))

        made_from = {
            "raw_dataset": raw.digest,
            "cleaner": CLEANER_VERSION,
            "cleaning": task.spec.cleaning.model_dump(mode="json"),
            "type": task.spec.type,
            "labels": task.spec.labels,
            "fields": {name: field.model_dump(mode="json") for name, field in task.spec.fields.items()},
        }
        artefact = publish(context, lake, (task.name, "clean_dataset"), "clean_dataset", made_from, write)
        kept, rejected = artefact.parquet("kept.parquet"), artefact.parquet("rejected.parquet")
        return result(
            artefact,
            {
                "kept": len(kept),
                "rejected": len(rejected),
                "truncated": artefact.json("counts.json")["truncated"],
                "rejected_by_reason": table(counted(rejected["reason"], "reason")),
                "labels": table(form.overview(kept["label"])),
            },
        )


@dg.multi_asset(
    specs=[
        dg.AssetSpec(
            f"{split}_split",
            deps=[clean_dataset],
            partitions_def=task_partitions,
            group_name=GROUP,
            kinds={"parquet"},
            code_version="1",
            description=f"Row ids of the {split} split. A row keeps its split for ever; near-duplicates share one.",
        )
        for split in SPLITS
    ],
    partitions_def=task_partitions,
    name="splits",
)
def splits(
    context: dg.AssetExecutionContext, environment: dg.ResourceParam[Environment], lake: dg.ResourceParam[Lake]
) -> Iterator[dg.MaterializeResult[Any]]:
    with typed_failures():
        task = task_named(environment, context.partition_key)
        clean_rows = lake.require(task.name, "clean_dataset")
        form = form_of(task.spec)
        earlier = lake.head(task.name, "assignments")
        made_from = {
            "task": task.name,
            "clean_dataset": clean_rows.digest,
            "split": task.spec.split.model_dump(mode="json"),
        }
        if earlier is not None and earlier.made_from["split"] != made_from["split"]:
            context.log.warning("the split settings changed: all rows are assigned anew")
            earlier = None
        if earlier is not None and {name: earlier.made_from[name] for name in made_from} == made_from:
            made_from = dict(earlier.made_from)  # nothing changed since
        else:
            made_from["earlier"] = earlier.digest if earlier is not None else ""

        def write_assignments(folder: Path) -> None:
            previous = None if earlier is None else earlier.parquet("assignments.parquet")
            kept = clean_rows.parquet("kept.parquet")
            dealt = kept.assign(text=kept["text"].map(form.compared), label=form.strata(kept["label"].tolist()))
            assigned = assign(dealt, task.spec.split, previous)
            assigned.to_parquet(folder / "assignments.parquet", index=False)

        assignments = publish(context, lake, (task.name, "assignments"), "assignments", made_from, write_assignments)
        assigned = assignments.parquet("assignments.parquet")
        present = assigned[assigned["present"]]
        labels = clean_rows.parquet("kept.parquet").set_index("row_id")["label"]
        for split in SPLITS:
            members = present.loc[present["split"] == split, ["row_id", "cluster_id"]]

            def write_split(folder: Path, members: pd.DataFrame = members) -> None:
                members.to_parquet(folder / "rows.parquet", index=False)

            parents = {"clean_dataset": clean_rows.digest, "assignments": assignments.digest, "split": split}
            artefact = publish(context, lake, (task.name, f"{split}_split"), f"{split}_split", parents, write_split)
            rows = members.assign(label=members["row_id"].map(labels))
            yield result(
                artefact,
                {
                    "rows": len(members),
                    "clusters": int(members["cluster_id"].nunique()),
                    "labels": table(form.overview(rows["label"])),
                    "held_out": int((present["split"] == "held_out").sum()),
                },
                asset_key=f"{split}_split",
            )
