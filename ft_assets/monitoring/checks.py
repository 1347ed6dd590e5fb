"""Checks of stage 5."""

import dagster as dg

from ft_assets.monitoring.assets import read_drift
from ft_assets.monitoring.traffic import day_bounds
from ft_assets.partitions import task_and_day, task_day_partitions
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger


@dg.asset_check(asset="served_traffic", partitions_def=task_day_partitions)
def no_gaps(
    context: dg.AssetCheckExecutionContext, lake: dg.ResourceParam[Lake], ledger: dg.ResourceParam[Ledger]
) -> dg.AssetCheckResult:
    """Every request the ledger answered that day is in the compacted traffic, and no earlier day is missing."""
    task, day = task_and_day(context.partition_key)
    stored = lake.require(task, f"served_traffic/{day}").parquet("traffic.parquet")
    answered = ledger.predictions_between(task, *day_bounds(day))
    lost = set(answered["id"]) - set(stored["prediction_id"])
    have = set(lake.heads(task, "served_traffic"))
    missing = sorted(one for one in ledger.traffic_days(task) if one < day and one not in have)
    return dg.AssetCheckResult(
        passed=not lost and not missing,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{len(answered)} answered, {len(lost)} of them not compacted; "
        f"earlier days without a snapshot: {len(missing)}",
        metadata={"missing_days": ", ".join(missing[:30]) or "none"},
    )


@dg.asset_check(asset="drift_report", partitions_def=task_day_partitions)
def no_drift(context: dg.AssetCheckExecutionContext, lake: dg.ResourceParam[Lake]) -> dg.AssetCheckResult:
    """Inputs, predictions, confidence and labelled accuracy are as they were when the champion was evaluated."""
    name, day = task_and_day(context.partition_key)
    found = read_drift(lake, name, day)
    reasons = [*found["drift"]["reasons"], found["accuracy"]["reason"]]
    return dg.AssetCheckResult(
        passed=not found["alarm"],
        severity=dg.AssetCheckSeverity.WARN,
        description="; ".join(reasons) or found["drift"]["verdict"],
    )
