"""The ledger's row of each training that ended, and the results folder of one whose worker could not write it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from ft_assets.training.failures import FAILURE, INTERRUPTED, failure_of, results_folder, write_results
from ft_assets.training.jobs import PLUGIN, made_on
from ft_assets.training.planning.prices import cost
from ft_resources.compute import WorkerDied
from ft_resources.environments import Environment
from ft_resources.errors import FtError, SpecError
from ft_resources.ledger import Ledger
from ft_resources.tracking import end_abandoned
from ft_resources.training_runs import TrainingRun
from ft_resources.usage import Usage

USAGE = tuple(field.name for field in fields(Usage))


@contextmanager
def recorded(
    ledger: Ledger, environment: Environment, job: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Record the training that runs inside this block: whether it ends with a report, with an error, or is stopped."""
    started = datetime.now(UTC)

    def failed(code: str) -> None:
        ledger.record_training(
            TrainingRun(
                **_identity(job),
                run_id=f"{job['tags']['dagster_run_id']}-{started:%H%M%S%f}",
                status="FAILED",
                started=started,
                ended=datetime.now(UTC),
                error=code,
            )
        )

    try:
        yield lambda report: ledger.record_training(_finished(environment, job, report))
    except dg.DagsterExecutionInterruptedError:
        failed(INTERRUPTED)
        end_abandoned(environment.mlflow, job["tags"]["dagster_run_id"])
        raise
    except FtError as error:
        failed(error.code)
        if isinstance(error, WorkerDied):
            end_abandoned(environment.mlflow, job["tags"]["dagster_run_id"])
            if not told_since(environment, job, started):
                _write_for(environment, job, error)
        raise


def _identity(job: Mapping[str, Any]) -> dict[str, Any]:
    made = job["made_from"]
    return {
        "dagster_run_id": job["tags"]["dagster_run_id"],
        "task": made["task"],
        "trained_from": job["key"],
        "training_rows_digest": made["train_split"],
        "validation_rows_digest": made["validation_split"],
        "template": job["template"],
        **_method(made),
    }


def _method(made: Mapping[str, Any]) -> dict[str, str]:
    """How something was trained, and on which base model; a plug-in trainer's class is its method, without a base."""
    if PLUGIN in made:
        return {"base": "none", "base_digest": "", "method": made[PLUGIN]["trainer"].rpartition(":")[2][:32]}
    settings = made["settings"]
    return {"base": settings["base"]["model"], "base_digest": made["base"], "method": settings["method"]}


def _cost(usage: Usage, report: Mapping[str, Any], environment: Environment) -> float | None:
    """What a training cost; None as well where the price table cannot be read: no reason to lose a training."""
    gpus = report["provenance"]["hardware"]["gpus"] if report["device"] == "cuda" else None
    try:
        return cost(usage, environment, str(gpus[0]) if gpus else "")
    except SpecError:
        return None


def _finished(environment: Environment, job: Mapping[str, Any], report: Mapping[str, Any]) -> TrainingRun:
    history = report["history"]
    best = history["validation"][history["best_epoch"] - 1]
    usage = {name: report["usage"][name] for name in USAGE}
    return TrainingRun(
        **_identity(job),
        **usage,
        run_id=report["mlflow_run"],
        status="FINISHED",
        started=datetime.fromisoformat(report["started"]),
        ended=datetime.fromisoformat(report["ended"]),
        adapter=report["adapter"],
        device=report["device"],
        precision=report["precision"],
        rows=report["rows"],
        tokens=history.get("tokens"),
        steps=len(history["loss"]),
        cost=_cost(Usage(**usage), report, environment),
        accuracy=best.get("accuracy"),
        macro_f1=best.get("macro_f1"),
        loss=best["loss"],
    )


def told_since(environment: Environment, job: Mapping[str, Any], started: datetime) -> bool:
    """Whether the worker itself wrote why it failed, which nobody else knows as well."""
    file = results_folder(environment, job["made_from"]["task"], job["run_name"]) / FAILURE
    return file.exists() and file.stat().st_mtime >= started.timestamp()


def _write_for(environment: Environment, job: Mapping[str, Any], error: WorkerDied) -> None:
    """The results folder of a worker that had no time to write it."""
    write_results(
        results_folder(environment, job["made_from"]["task"], job["run_name"]),
        config=job["made_from"]["settings"],
        origins=job["origins"],
        metrics={},
        log=str(error),
        usage=None,
        curve=None,
        provenance=made_on(job),
        failure=failure_of(error),
    )
