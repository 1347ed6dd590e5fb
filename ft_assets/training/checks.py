"""Checks of stage 2."""

from collections.abc import Iterator

import dagster as dg

from ft_assets.data.assembly import split_rows
from ft_assets.data.checks import judged, specs
from ft_assets.materialising import task_named
from ft_assets.partitions import task_partitions
from ft_assets.training.verdicts import of_adapter
from ft_resources.environments import Environment
from ft_resources.lake import Lake


@dg.asset_check(asset="search_results", partitions_def=task_partitions)
def within_budget(
    context: dg.AssetCheckExecutionContext, environment: dg.ResourceParam[Environment], lake: dg.ResourceParam[Lake]
) -> dg.AssetCheckResult:
    """The search ran no more trials than the task allows, and ended in the epoch in which time or money was spent."""
    task = task_named(environment, context.partition_key)
    found, budget = lake.require(task.name, "search_results").json("trials.json"), task.spec.search
    trials = found["trials"]
    longest = max(trials, key=lambda trial: trial["seconds"])
    passed = len(trials) <= budget.trials and found["seconds"] <= budget.max_minutes * 60 + longest["seconds"]
    if budget.max_cost is not None:
        passed = passed and found["cost"] <= budget.max_cost + longest["cost"]
    return dg.AssetCheckResult(
        passed=passed,
        description=f"{len(trials)} of {budget.trials} trials, "
        f"{found['seconds'] / 60:.1f} of {budget.max_minutes:g} minutes",
    )


@dg.multi_asset_check(specs=specs("adapter", blocking=("loss_finite", "beats_trivial_baseline")))
def adapter_checks(
    context: dg.AssetCheckExecutionContext, environment: dg.ResourceParam[Environment], lake: dg.ResourceParam[Lake]
) -> Iterator[dg.AssetCheckResult]:
    """The run stayed finite, and on validation rows the adapter beats always answering the commonest label."""
    task = task_named(environment, context.partition_key)
    trained = lake.require(task.name, "adapter")
    validation = split_rows(lake, trained.made_from["validation_split"])
    yield from judged("adapter", of_adapter(trained.json("training.json"), validation))
