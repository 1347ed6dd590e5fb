"""Checks of stage 1. Blocking ones keep bad rows from training."""

from collections.abc import Iterator, Mapping

import dagster as dg

from ft_assets.data import verdicts
from ft_assets.data.forms import Verdict, form_of
from ft_assets.data.splits import SPLITS
from ft_assets.materialising import check, table, task_named
from ft_assets.partitions import task_partitions
from ft_resources.environments import Environment
from ft_resources.lake import Lake


def specs(asset: str, *, blocking: tuple[str, ...] = (), informing: tuple[str, ...] = ()) -> list[dg.AssetCheckSpec]:
    """Partitioned check specs of one asset."""
    return [
        dg.AssetCheckSpec(name, asset=asset, blocking=name in blocking, partitions_def=task_partitions)
        for name in (*blocking, *informing)
    ]


def judged(asset: str, verdicts: Mapping[str, Verdict]) -> Iterator[dg.AssetCheckResult]:
    """Verdicts as results of the checks of the same names."""
    for name, verdict in verdicts.items():
        yield check(
            name, asset, verdict.passed, verdict.reason, {"rows": table(verdict.rows)} if verdict.rows else None
        )


@dg.multi_asset_check(specs=specs("raw_dataset", blocking=("schema_valid", "enough_rows", "labels_known")))
def raw_dataset_checks(
    context: dg.AssetCheckExecutionContext, environment: dg.ResourceParam[Environment], lake: dg.ResourceParam[Lake]
) -> Iterator[dg.AssetCheckResult]:
    """The snapshot has the agreed columns, enough rows, and no label that the task does not declare."""
    task = task_named(environment, context.partition_key)
    rows = lake.require(task.name, "raw_dataset").parquet("rows.parquet")
    yield from judged("raw_dataset", verdicts.of_raw(rows, task.spec))


@dg.multi_asset_check(
    specs=specs(
        "clean_dataset", blocking=("no_pii_left",), informing=("rejects_within_budget", "class_balance", "label_noise")
    )
)
def clean_dataset_checks(
    context: dg.AssetCheckExecutionContext, environment: dg.ResourceParam[Environment], lake: dg.ResourceParam[Lake]
) -> Iterator[dg.AssetCheckResult]:
    """No personal data of the asked kinds is left; rejections, balance and label noise are within what is usual."""
    task = task_named(environment, context.partition_key)
    artefact = lake.require(task.name, "clean_dataset")
    kept, rejected = artefact.parquet("kept.parquet"), artefact.parquet("rejected.parquet")
    yield from judged("clean_dataset", verdicts.of_clean(kept, task.spec))
    share = len(rejected) / max(1, len(kept) + len(rejected))
    allowed = task.spec.cleaning.max_reject_share
    yield check(
        "rejects_within_budget",
        "clean_dataset",
        share <= allowed,
        f"{share:.1%} of the rows were rejected, {allowed:.0%} are allowed",
        {"share": share},
        warn=True,
    )
    form = form_of(task.spec)
    for name, verdict in (("class_balance", form.balance(kept["label"])), ("label_noise", form.noise(kept, rejected))):
        yield check(name, "clean_dataset", verdict.passed, verdict.reason, {"rows": table(verdict.rows)}, warn=True)


@dg.multi_asset_check(
    specs=[
        *specs("train_split", blocking=("no_leakage",)),
        *specs("train_split", blocking=("every_class_present",)),
        *specs("validation_split", blocking=("every_class_present",)),
        *specs("test_split", blocking=("every_class_present",)),
    ]
)
def split_checks(
    context: dg.AssetCheckExecutionContext, environment: dg.ResourceParam[Environment], lake: dg.ResourceParam[Lake]
) -> Iterator[dg.AssetCheckResult]:
    """No row, and no near-copy of a row, stands in two splits; every split has rows of every label."""
    task = task_named(environment, context.partition_key)
    kept = lake.require(task.name, "clean_dataset").parquet("kept.parquet")
    parts = {split: lake.require(task.name, f"{split}_split").parquet("rows.parquet") for split in SPLITS}
    for (split, name), verdict in verdicts.of_splits(kept, parts, task.spec).items():
        yield from judged(f"{split}_split", {name: verdict})
