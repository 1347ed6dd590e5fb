"""Stage 2: the trials that were asked for, and the adapter trained with the best of them."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from ft_assets.materialising import image, publish, result, table, task_named, typed_failures
from ft_assets.partitions import task_partitions
from ft_assets.plots import loss_curve
from ft_assets.tasks import Task
from ft_assets.training.continuing import check_incremental, parent_of
from ft_assets.training.failures import CONFIG, results_folder
from ft_assets.training.identity import TRAINER
from ft_assets.training.jobs import PLUGIN, checkpoint_of, inputs_of, job, key_of, made_from, trace_record, traced
from ft_assets.training.recipes import (
    Merged,
    Plugged,
    Settings,
    of_transformers,
    require_published,
    resolve,
    with_values,
)
from ft_assets.training.records import recorded
from ft_assets.training.relief import Relief, reliefs_of, relieved, under
from ft_assets.training.searching import plots as search_plots
from ft_assets.training.searching import trials as search
from ft_resources.compute import Compute
from ft_resources.environments import Environment
from ft_resources.errors import OutOfMemory
from ft_resources.lake import Artefact, Lake, short
from ft_resources.ledger import Ledger

GROUP = "2_training"
WORKER = "ft_assets.training.worker"
MEMORY_RELIEF, RELIEF_FILE = "memory_relief", "relief.json"
"""Artefact, and its file: how a training goes on that needs more memory than there is."""
SEARCH_WORKER = "ft_assets.training.searching.worker"
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
    ledger: dg.ResourceParam[Ledger],
    compute: Compute,
) -> dg.MaterializeResult[Any]:
    """Trials of the hyper-parameter search with their cost; one untrained trial when no search is asked."""
    with typed_failures():
        task = task_named(environment, context.partition_key)
        spec, resolved = task.spec.search, resolve(task)
        recipe = _made(context, lake, ledger, environment, task, resolved, inputs_of(lake, task))

        def write(folder: Path) -> None:
            found = search.untrained()
            if search.needed(spec):
                described = search.job(recipe, task, of_transformers(resolved), environment, context.run.run_id)
                described = traced(described, _trace(context, resolved, "trials.json of search_results"))
                found = compute.run(context, SEARCH_WORKER, described)
                for run in search.training_runs(described, found):
                    ledger.record_training(run)
            search_plots.write(folder, found)

        made = {**recipe, "search": spec.model_dump(mode="json")}
        artefact = publish(context, lake, (task.name, "search_results"), "search_results", made, write)
        found = artefact.json("trials.json")
        curve = found["learning_curve"]
        charts = sorted(name for name in artefact.files if name.endswith(".png"))
        return result(
            artefact,
            {
                "trials": len(found["trials"]),
                "seconds": found["seconds"],
                "cost": f"{found['cost']:.4f} {found['currency']}".strip(),
                "ended": found["ended"],
                "best_values": dg.MetadataValue.json(found["best"]),
                "leaderboard": table(search_plots.leaderboard(found)),
                **({"learning_curve_says": dg.MetadataValue.md(curve["sentence"])} if curve else {}),
                **{name.removesuffix(".png"): image(artefact.read(name), name) for name in charts},
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
    ledger: dg.ResourceParam[Ledger],
    compute: Compute,
) -> dg.MaterializeResult[Any]:
    """LoRA adapter, head and label map; loads in plain `peft.PeftModel.from_pretrained`. Or what a plug-in trained."""
    with typed_failures():
        task = task_named(environment, context.partition_key)
        found = lake.require(task.name, "search_results").json("trials.json")
        chosen = with_values(resolve(task), found["best"], "search")
        artefact, report = _train(context, lake, ledger, compute, environment, task, chosen, inputs_of(lake, task))
        lake.set_head(task.name, "adapter", artefact.digest, context.run.run_id)
        history = artefact.json("training.json")
        best = history["validation"][history["best_epoch"] - 1]
        config = str(Path(report["results"]) / CONFIG) if report else f"{artefact.uri}/adapter.json"
        return result(
            artefact,
            {
                "reused": not report,
                **_used(report),
                "best_epoch": history["best_epoch"],
                **{f"validation_{name}": value for name, value in best.items()},
                **_trained(artefact, history),
                "size_megabytes": sum(entry["size"] for entry in artefact.files.values()) / 1e6,
                "loss_curve": image(_loss_curve(history), "loss"),
                "settings": dg.MetadataValue.json(artefact.made_from["settings"]),
                "trace_record": dg.MetadataValue.json(_trace(context, chosen, config)),
                **({"parent": parent} if (parent := artefact.made_from.get("parent")) else {}),
                **(
                    {"memory_relief": "; ".join(map(str, reliefs))}
                    if (reliefs := reliefs_of(artefact.made_from))
                    else {}
                ),
                "origins": dg.MetadataValue.json(dict(chosen.origins)),
                "mlflow": f"experiment ft/{task.name}, run with tag adapter {artefact.digest}; see it with: ft mlflow",
            },
        )


def _made(
    context: dg.AssetExecutionContext,
    lake: Lake,
    ledger: Ledger,
    environment: Environment,
    task: Task,
    resolved: Merged,
    inputs: Mapping[str, str],
) -> dict[str, Any]:
    """What the adapter is made from, with the adapter that it starts from where the task wants that."""
    require_published(lake, resolved.template)
    check_incremental(task, resolved)
    search.check_space(task, resolved)
    made = made_from(task, resolved, inputs, environment)
    parent = parent_of(task, made, lake, ledger)
    if task.spec.retraining == "incremental":
        start = f"the weights of adapter {short(parent)}" if parent else "fresh weights: none is live that knew less"
        context.log.info(f"incremental retraining starts from {start}")
    return {**made, "parent": parent} if parent else made


def _trace(context: dg.AssetExecutionContext, resolved: Merged, config: str) -> dict[str, Any]:
    record = context.instance.get_run_record_by_id(context.run.run_id)
    assert record is not None  # it is the run that asks
    return trace_record(resolved, context.run.run_id, context.run.tags, record.create_timestamp, config)


def _trained(artefact: Artefact, history: Mapping[str, Any]) -> dict[str, Any]:
    """What a plug-in trainer is called, or how much of a base model was trained on how many tokens."""
    if PLUGIN in artefact.made_from:
        return {"trainer": "{trainer}, version {version}".format_map(artefact.made_from[PLUGIN])}
    trainable, total = history["trainable_parameters"], history["total_parameters"]
    return {
        "tokens": history["tokens"],
        "trainable": f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})",
    }


def _used(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a training that ran now took."""
    if not report:
        return {}
    usage, made_on = report["usage"], report["provenance"]
    return {
        "seconds": usage["wall_seconds"],
        "cpu_seconds": usage["cpu_seconds"],
        "peak_memory_megabytes": usage["peak_memory_bytes"] / 1e6,
        "energy_wh": f"{usage['energy_wh']:.2f} ({usage['energy_source']})",
        "made_on": dg.MetadataValue.json(made_on),
        "results": dg.MetadataValue.path(report["results"]),
    }


def _loss_curve(history: Mapping[str, Any]) -> bytes:
    steps = len(history["loss"])
    each = steps // len(history["validation"])
    validation = [(epoch * each, measured["loss"]) for epoch, measured in enumerate(history["validation"], start=1)]
    return loss_curve(range(1, steps + 1), history["loss"], validation)


def _train(
    context: dg.AssetExecutionContext,
    lake: Lake,
    ledger: Ledger,
    compute: Compute,
    environment: Environment,
    task: Task,
    resolved: Merged,
    inputs: Mapping[str, str],
) -> tuple[Artefact, Mapping[str, Any]]:
    """The adapter of these settings and rows, and the worker's report; an empty one when it was made before.

    Out of memory the training is planned anew, with the same rows per step in smaller parts, and goes on from its last
    checkpoint. From which step on it went on how is part of what the adapter is made from, and so it can be made again;
    it is remembered, so that the next run does not run out of memory first.
    """
    reliefs = list[Relief]()
    while True:
        made = under(_made(context, lake, ledger, environment, task, resolved, inputs), reliefs)
        found = lake.find("adapter", made)
        if found is not None:
            context.log.info(f"adapter {short(found.digest)} is reused: the same rows and settings made it before")
            return found, {}
        needed = {**made, "memory_gb": environment.memory_gb}
        known = lake.find(MEMORY_RELIEF, needed)
        if known is not None:
            reliefs.append(Relief.model_validate(known.json(RELIEF_FILE)))
            _hand_over(lake, made, under(made, reliefs))
            continue
        described = job(made, resolved, environment, context.run.run_id)
        folder = results_folder(environment, task.name, described["run_name"])
        described = traced(described, _trace(context, resolved, str(folder / CONFIG)))
        try:
            with recorded(ledger, environment, described) as record:
                processes = 1 if isinstance(resolved, Plugged) else environment.processes
                report = compute.run(context, WORKER, described, processes=processes)
                record(report)
            return lake.open(report["adapter"]), report
        except OutOfMemory as error:
            if isinstance(resolved, Plugged):
                raise
            relief = _relieve(lake, described, of_transformers(resolved).settings, reliefs, needed)
            context.log.warning(f"{error} It goes on {relief}: the same rows per step, in smaller parts.")


def _relieve(
    lake: Lake, job: Mapping[str, Any], settings: Settings, reliefs: list[Relief], needed: Mapping[str, Any]
) -> Relief:
    """Remember how the training of `job` goes on that ran out of memory.

    Args:
        reliefs: Those it had already.
        needed: Under which it is found again.
    """
    saved = lake.head(job["made_from"]["task"], checkpoint_of(job["key"]))
    step = saved.made_from["step"] if saved else 0
    relief = relieved(settings, reliefs, step, settings.base.max_tokens, settings.training.batch_size)
    with tempfile.TemporaryDirectory(prefix="ft-") as scratch:
        (Path(scratch) / RELIEF_FILE).write_text(relief.model_dump_json())
        lake.publish(MEMORY_RELIEF, Path(scratch), needed)
    return relief


def _hand_over(lake: Lake, made: Mapping[str, Any], relieved: Mapping[str, Any]) -> None:
    """Let a training under one relief more begin at the checkpoint it was relieved at, which stays the other's too."""
    task, before, after = made["task"], checkpoint_of(key_of(made)), checkpoint_of(key_of(relieved))
    saved = lake.head(task, before)
    if saved is None or lake.head(task, after) is not None:
        return
    if saved.made_from["step"] == reliefs_of(relieved)[-1].after_step:
        lake.set_head(task, after, saved.digest, key_of(relieved))
