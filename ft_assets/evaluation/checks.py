"""The gates: checks over the one decision, which `release` takes again."""

from collections.abc import Iterator

import dagster as dg

from ft_assets.data.checks import specs
from ft_assets.evaluation.gate import GATES, decide, explained
from ft_assets.evaluation.stored import read_report
from ft_assets.materialising import check, task_named
from ft_resources.environments import Environment
from ft_resources.lake import Lake


@dg.multi_asset_check(specs=specs("eval_report", blocking=tuple(GATES)))
def gates(
    context: dg.AssetCheckExecutionContext, environment: dg.ResourceParam[Environment], lake: dg.ResourceParam[Lake]
) -> Iterator[dg.AssetCheckResult]:
    """Every gate of the task's policy over the stored report; each refusal says what was measured and allowed."""
    task = task_named(environment, context.partition_key)
    _, report = read_report(lake, task.name)
    for name, gate in decide(report, task.spec.gates).gates.items():
        yield check(
            name,
            "eval_report",
            gate.passed,
            explained(name, gate),
            {"applies": gate.applies, **{k: str(v) for k, v in gate.evidence.items()}},
        )
