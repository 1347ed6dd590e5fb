"""Stage 3: candidate and champion on the frozen test split, in the engine that serves."""

from typing import Any

import dagster as dg

from ft_assets.evaluation.generation.report import GenerationReport
from ft_assets.evaluation.identity import EVALUATOR, environment_of_evaluation
from ft_assets.evaluation.servable import why_unserved
from ft_assets.evaluation.stored import Report, parse_report
from ft_assets.materialising import image, result, table, task_named, typed_failures
from ft_assets.partitions import task_partitions
from ft_assets.plots import confusion, reliability
from ft_assets.training.jobs import PLUGIN
from ft_resources.compute import Compute
from ft_resources.environments import Environment
from ft_resources.errors import EvaluationError
from ft_resources.lake import Lake, digest_of, short
from ft_resources.ledger import Ledger

GROUP = "3_evaluation"
LABELS, TEXTS = "ft_assets.evaluation.worker", "ft_assets.evaluation.generation.worker"
"""The evaluation process of labels and of written answers."""


@dg.asset(
    partitions_def=task_partitions,
    deps=["adapter", "train_split", "validation_split", "test_split"],
    group_name=GROUP,
    kinds={"evaluate"},
    code_version=EVALUATOR,
    retry_policy=dg.RetryPolicy(max_retries=2, delay=2),
)
def eval_report(
    context: dg.AssetExecutionContext,
    environment: dg.ResourceParam[Environment],
    lake: dg.ResourceParam[Lake],
    ledger: dg.ResourceParam[Ledger],
    compute: Compute,
) -> dg.MaterializeResult[Any]:
    """Per-row answers and metrics with intervals of candidate, champion and baselines; slices, calibration, latency."""
    with typed_failures():
        task = task_named(environment, context.partition_key)
        inputs = {
            name: lake.require(task.name, name).digest
            for name in ("adapter", "train_split", "validation_split", "test_split")
        }
        candidate = lake.open(inputs["adapter"])
        if PLUGIN not in candidate.made_from and (why := why_unserved(candidate.json("adapter.json"))):
            raise EvaluationError(
                f"what was trained cannot be served, so it is not evaluated: {why}",
                where=f"task {task.name}",
                mend="Use it as it is: plain peft, or plain transformers, loads it. Or train plain LoRA.",
            )
        policy = task.spec.gates.model_dump(mode="json")
        labels = task.spec.type == "text-classification"
        made_from = {
            **inputs,
            **_champion(lake, ledger, task.name, inputs["adapter"]),
            **environment_of_evaluation(environment),
            **({} if labels else {"engine": environment.generation_engine}),
            "evaluator": EVALUATOR,
            "policy": digest_of(policy),
        }
        artefact = lake.find("eval_report", made_from)
        if artefact is None:
            job = {**made_from, "task": task.name, "lake": environment.lake, "policy": policy, "made_from": made_from}
            artefact = lake.open(compute.run(context, LABELS if labels else TEXTS, job)["report"])
        else:
            context.log.info(f"report {short(artefact.digest)} is reused: the same adapters and rows made it before")
        lake.set_head(task.name, "eval_report", artefact.digest, context.run.run_id)
        return result(artefact, _metadata(parse_report(artefact), str(artefact.path("report.html"))))


def _champion(lake: Lake, ledger: Ledger, task: str, candidate: str) -> dict[str, str]:
    """The live adapter, the precision it is served in and the rows it was itself tested on.

    A candidate that is live keeps its opponent of then.
    """
    live = ledger.live_release(task)
    if live is None:
        return {"champion": "", "champion_precision": "", "champion_test_split": ""}
    served = {"champion": live["adapter"], "champion_precision": live["decision"].get("precision", "auto")}
    if live["report"] is None:
        return {**served, "champion_test_split": ""}
    decided_on = lake.open(live["report"]).made_from
    if live["adapter"] == candidate:
        then = {name: decided_on[name] for name in ("champion", "champion_test_split")}
        return {**then, "champion_precision": decided_on.get("champion_precision", "auto" if then["champion"] else "")}
    return {**served, "champion_test_split": decided_on["test_split"]}


def _metadata(report: Report, page: str) -> dict[str, Any]:
    compared = [
        {
            "model": model,
            **{metric: f"{i.value:.3f} [{i.low:.3f}, {i.high:.3f}]" for metric, i in metrics.items()},
        }
        for model, metrics in report.models.items()
    ]
    shared = {
        "rows": report.rows,
        "candidate": short(report.adapter),
        "champion": short(report.champion) if report.champion else "none yet",
        "metrics": table(compared),
        "report": dg.MetadataValue.path(page),
    }
    if isinstance(report, GenerationReport):
        return {
            **shared,
            report.score: report.models["candidate"][report.score].value,
            "loss": report.models["candidate"]["loss"].value,
            "fields": table([{"field": name, **each.model_dump()} for name, each in report.per_field.items()]),
            "first_token_p95_ms": report.latency.first_token_p95_ms,
            "tokens_per_second": report.latency.tokens_per_second,
        }
    return {
        **shared,
        "accuracy": report.models["candidate"]["accuracy"].value,
        "macro_f1": report.models["candidate"]["macro_f1"].value,
        "confusion": image(confusion(report.confusion, report.labels), "confusion"),
        "reliability": image(reliability(report.calibration.bins), "reliability"),
        "latency_p95_ms": report.latency.p95_ms,
    }
