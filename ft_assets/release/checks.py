"""Checks of stage 4."""

import dagster as dg

from ft_assets.materialising import table, task_named
from ft_assets.partitions import task_partitions
from ft_assets.release import golden
from ft_assets.release.model_card import missing
from ft_resources.environments import Environment
from ft_resources.lake import Lake
from ft_resources.tracking import ModelRegistry


@dg.asset_check(asset="model_version", partitions_def=task_partitions)
def card_complete(
    context: dg.AssetCheckExecutionContext,
    environment: dg.ResourceParam[Environment],
    lake: dg.ResourceParam[Lake],
    registry: dg.ResourceParam[ModelRegistry],
) -> dg.AssetCheckResult:
    """The registered version has one model card with every required entry, read back from the registry."""
    task = task_named(environment, context.partition_key)
    about = lake.require(task.name, "model_version").json("version.json")
    card = registry.card(task.name, about["version"])
    absent = missing(card)
    same = card["adapter"] == about["adapter"]
    return dg.AssetCheckResult(
        passed=not absent and same,
        description=f"version {about['version']}: "
        + (f"entries missing: {', '.join(absent)}" if absent else "every entry is there")
        + ("" if same else f"; but it is the card of adapter {card['adapter'][:12]}"),
    )


@dg.asset_check(asset="bento_service", partitions_def=task_partitions, blocking=True)
def answers_golden_requests(
    context: dg.AssetCheckExecutionContext, environment: dg.ResourceParam[Environment], lake: dg.ResourceParam[Lake]
) -> dg.AssetCheckResult:
    """The started Bento gave the labels or texts that were evaluated, with the same confidence to .02, and answered the
    test requests of the task file (`serving.test_requests`) as they say.
    """
    task = task_named(environment, context.partition_key)
    service = lake.require(task.name, "bento_service").json("service.json")
    asked, samples = service["golden"], service.get("test_requests", [])
    wrong, missed = golden.wrong(asked), [one for one in samples if not one["right"]]
    told = golden.complaints(service)
    counted = f"{len(asked) - len(wrong)} of {len(asked)} golden requests answered as evaluated" + (
        f", {len(samples) - len(missed)} of {len(samples)} test requests as the task file says" if samples else ""
    )
    return dg.AssetCheckResult(
        passed=service["answers_match"] and not told,
        description="; ".join([counted, *told]) + (f". {golden.mend(service)}" if told else ""),
        metadata={"wrong": table(wrong), "wrong_test_requests": table(missed)},
    )
