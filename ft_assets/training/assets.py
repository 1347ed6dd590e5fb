"""Stage 2: the trials that were asked for, and the adapter trained with the best of them."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from ft_assets.materialising import image, publish, result, table, task_named, typed_failures
from ft_assets.partitions import task_partitions
from ft_assets.plots import loss_curve
from ft_assets.tasks import Task
from ft_assets.training.identity import TRAINER, environment_of_training
from ft_assets.training.recipes import Resolved, resolve, with_values
from ft_assets.training.search import run_trials
from ft_resources.base_models import resolve as resolve_base
from ft_resources.compute import Compute
from ft_resources.environments import Environment
from ft_resources.lake import Artefact, Lake, digest_of, short
from ft_resources.tracking import TRAINED_FROM

GROUP = "2_training"
WORKER = "ft_assets.training.worker"
RETRIES = dg.RetryPolicy(max_retries=2, delay=2, backoff=dg.Backoff.EXPONENTIAL)
"""For a worker that died; a typed error forbids them."""


@dg.asset(
    partitions_def=task_partitions,
    deps=["train_split", "validation_split"],
    group_name=GROUP,
    kinds={"optuna"},
    code_version=TRAINER,
    retry_policy=RETRIES,
)
def search_results(
    context: dg.AssetExecutionContext,
    environment: dg.ResourceParam[Environment],
    lake: dg.ResourceParam[Lake],
    compute: Compute,
) -> dg.MaterializeResult[Any]:
    """Trials of the hyper-parameter search with their cost; one untrained trial when no search is asked."""
    with typed_failures():
        task = task_named(environment, context.partition_key)
        resolved = resolve(task)
        inputs = _inputs(lake, task)

        def train(values: Mapping[str, Any], number: int) -> tuple[Artefact, float]:
            trial = with_values(resolved, values, f"search trial {number}")
            return _train(context, lake, compute, environment, task, trial, inputs)

        def write(folder: Path) -> None:
            trials = run_trials(task.spec.search, resolved.settings.training.seed, train, context.log.info)
            (folder / "trials.json").write_text(json.dumps(trials, indent=1, sort_keys=True))

        made_from = {
            **_made_from(task, resolved, inputs, environment),
            "search": task.spec.search.model_dump(mode="json"),
        }
        artefact = publish(context, lake, (task.name, "search_results"), "search_results", made_from, write)
        trials = artefact.json("trials.json")
        return result(
            artefact,
            {
                "trials": len(trials["trials"]),
                "seconds": trials["seconds"],
                "best_values": dg.MetadataValue.json(trials["best"]),
                "leaderboard": table(trials["trials"]),
            },
        )


@dg.asset(
    partitions_def=task_partitions,
    deps=[search_results, "train_split", "validation_split"],
    group_name=GROUP,
    kinds={"pytorch", "huggingface", "mlflow"},
    code_version=TRAINER,
    retry_policy=RETRIES,
)
def adapter(
    context: dg.AssetExecutionContext,
    environment: dg.ResourceParam[Environment],
    lake: dg.ResourceParam[Lake],
    compute: Compute,
) -> dg.MaterializeResult[Any]:
    """LoRA adapter, head and label map; loads in plain `peft.PeftModel.from_pretrained`."""
    with typed_failures():
        task = task_named(environment, context.partition_key)
        search = lake.require(task.name, "search_results").json("trials.json")
        chosen = with_values(resolve(task), search["best"], "search")
        artefact, seconds = _train(context, lake, compute, environment, task, chosen, _inputs(lake, task))
        lake.set_head(task.name, "adapter", artefact.digest, context.run.run_id)
        history = artefact.json("training.json")
        best = history["validation"][history["best_epoch"] - 1]
        return result(
            artefact,
            {
                "reused": seconds == 0,
                "seconds": seconds,
                "best_epoch": history["best_epoch"],
                **{f"validation_{name}": value for name, value in best.items()},
                "trainable": f"{history['trainable_parameters']:,} of {history['total_parameters']:,} parameters "
                f"({history['trainable_parameters'] / history['total_parameters']:.2%})",
                "size_megabytes": sum(entry["size"] for entry in artefact.files.values()) / 1e6,
                "loss_curve": image(_loss_curve(history), "loss"),
                "settings": dg.MetadataValue.json(chosen.settings.model_dump()),
                "origins": dg.MetadataValue.json(dict(chosen.origins)),
                "mlflow": f"experiment ft/{task.name}, run with tag adapter {artefact.digest}; see it with: ft mlflow",
            },
        )


def _loss_curve(history: Mapping[str, Any]) -> bytes:
    steps = len(history["loss"])
    each = steps // len(history["validation"])
    validation = [(epoch * each, measured["loss"]) for epoch, measured in enumerate(history["validation"], start=1)]
    return loss_curve(range(1, steps + 1), history["loss"], validation)


def _inputs(lake: Lake, task: Task) -> dict[str, str]:
    return {split: lake.require(task.name, split).digest for split in ("train_split", "validation_split")}


def _made_from(task: Task, resolved: Resolved, inputs: Mapping[str, str], environment: Environment) -> dict[str, Any]:
    return {
        **inputs,
        "task": task.name,
        "labels": task.spec.labels,
        "preparation": {"pii": list(task.spec.cleaning.pii), "max_chars": task.spec.cleaning.max_chars},
        "settings": resolved.settings.model_dump(mode="json"),
        "template": resolved.template_digest,
        "base": resolve_base(resolved.settings.base.model).digest,
        "trainer": TRAINER,
        "environment": environment_of_training(environment),
    }


def _train(
    context: dg.AssetExecutionContext,
    lake: Lake,
    compute: Compute,
    environment: Environment,
    task: Task,
    resolved: Resolved,
    inputs: Mapping[str, str],
) -> tuple[Artefact, float]:
    """The adapter of these settings and rows, and the seconds its training took now (0 when it was made before)."""
    made_from = _made_from(task, resolved, inputs, environment)
    found = lake.find("adapter", made_from)
    if found is not None:
        context.log.info(f"adapter {short(found.digest)} is reused: the same rows and settings made it before")
        return found, 0.0
    job = {
        **inputs,
        "task": task.name,
        "labels": task.spec.labels,
        "settings": made_from["settings"],
        "origins": dict(resolved.origins),
        "template": resolved.template,
        "preparation": made_from["preparation"],
        "lake": environment.lake,
        "mlflow": environment.mlflow,
        "run_name": f"{task.name} {context.run.run_id[:8]}",
        "tags": {
            "dagster_run_id": context.run.run_id,
            "task": task.name,
            TRAINED_FROM: digest_of(made_from),
            **inputs,
        },
        "made_from": made_from,
    }
    started = time.monotonic()
    report = compute.run(context, WORKER, job)
    return lake.open(report["adapter"]), time.monotonic() - started
