"""Checks of stage 2."""

import math
from collections.abc import Iterator

import dagster as dg

from ft_assets.data.assembly import split_rows
from ft_assets.data.checks import specs
from ft_assets.materialising import check, task_named
from ft_assets.partitions import task_partitions
from ft_resources.environments import Environment
from ft_resources.lake import Lake


@dg.asset_check(asset="search_results", partitions_def=task_partitions)
def within_budget(
    context: dg.AssetCheckExecutionContext, environment: dg.ResourceParam[Environment], lake: dg.ResourceParam[Lake]
) -> dg.AssetCheckResult:
    """The search ran no more trials, and started none later, than the task allows."""
    task = task_named(environment, context.partition_key)
    found, budget = lake.require(task.name, "search_results").json("trials.json"), task.spec.search
    trials = found["trials"]
    before_last = found["seconds"] - trials[-1]["seconds"]
    passed = len(trials) <= budget.trials and before_last <= budget.max_minutes * 60
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
    history = trained.json("training.json")
    values = [*history["loss"], *(value for epoch in history["validation"] for value in epoch.values())]
    yield check(
        "loss_finite",
        "adapter",
        bool(history["loss"]) and all(math.isfinite(value) for value in values),
        f"{len(history['loss'])} steps, loss {history['loss'][0]:.3f} to {history['loss'][-1]:.3f}",
    )
    labels = split_rows(lake, trained.made_from["validation_split"])["label"]
    trivial = float(labels.value_counts(normalize=True).max())
    accuracy = history["validation"][history["best_epoch"] - 1]["accuracy"]
    yield check(
        "beats_trivial_baseline",
        "adapter",
        accuracy > trivial,
        f"validation accuracy {accuracy:.3f} on {len(labels)} rows; the commonest label alone gets {trivial:.3f}",
        {"accuracy": accuracy, "trivial": trivial},
    )
