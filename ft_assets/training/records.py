"""The ledger's row of each training that ended, and the results folder of one whose worker could not write it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg

from ft_assets.training.failures import (
    ENVIRONMENT,
    FAILURE,
    INTERRUPTED,
    RESOURCES,
    failure_of,
    results_folder,
    write_results,
)
from ft_assets.training.jobs import PLUGIN, made_on
from ft_assets.training.planning.prices import cost
from ft_resources.compute import WorkerDied
from ft_resources.environments import Environment
from ft_resources.errors import FtError, SpecError
from ft_resources.ledger import Ledger
from ft_resources.tracking import end_abandoned
from ft_resources.training_runs import TrainingRun
from ft_resources.usage import Usage, sampled_usage


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
                **_took(environment, job, started),
            )
        )

    try:
        yield lambda report: ledger.record_training(_finished(environment, job, report))
    except dg.DagsterExecutionInterruptedError:
        failed(INTERRUPTED)
        end_abandoned(environment.mlflow, job["tags"]["dagster_run_id"])
        raise
    except FtError as error:
        if isinstance(error, WorkerDied):
            end_abandoned(environment.mlflow, job["tags"]["dagster_run_id"])
            if not _written_since(started, _results(environment, job) / FAILURE):
                _write_for(environment, job, error, started)
        failed(error.code)
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


def _cost(usage: Usage, gpus: Sequence[str] | None, environment: Environment) -> float | None:
    """What a training cost; None as well where the price table cannot be read: no reason to lose a training."""
    try:
        return cost(usage, environment, str(gpus[0]) if gpus else "")
    except SpecError:
        return None


def _finished(environment: Environment, job: Mapping[str, Any], report: Mapping[str, Any]) -> TrainingRun:
    history = report["history"]
    best = history["validation"][history["best_epoch"] - 1]
    usage = Usage(**report["usage"])
    return TrainingRun(
        **_identity(job),
        **asdict(usage),
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
        cost=_cost(usage, report["provenance"]["hardware"]["gpus"], environment),
        accuracy=best.get("accuracy"),
        macro_f1=best.get("macro_f1"),
        loss=best["loss"],
    )


def _took(environment: Environment, job: Mapping[str, Any], started: datetime) -> dict[str, Any]:
    """What a training took that ended without an adapter, as its results folder tells; nothing where none began."""
    folder = _results(environment, job)
    usage, gpus = _sampled(folder, started), None
    if _written_since(started, folder / ENVIRONMENT):
        with suppress(ValueError):  # the worker was killed while it wrote
            told = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
            usage = Usage(**told["usage"]) if told["usage"] else None
            gpus = told["provenance"]["hardware"]["gpus"]
    return {**asdict(usage), "cost": _cost(usage, gpus, environment)} if usage else {}


def _sampled(folder: Path, started: datetime) -> Usage | None:
    return sampled_usage(folder / RESOURCES) if _written_since(started, folder / RESOURCES) else None


def _results(environment: Environment, job: Mapping[str, Any]) -> Path:
    return results_folder(environment, job["made_from"]["task"], job["run_name"])


def _written_since(started: datetime, file: Path) -> bool:
    return file.exists() and file.stat().st_mtime >= started.timestamp()


def _write_for(environment: Environment, job: Mapping[str, Any], error: WorkerDied, started: datetime) -> None:
    """The results folder of a worker that had no time to write it."""
    folder = _results(environment, job)
    write_results(
        folder,
        config=job["made_from"]["settings"],
        origins=job["origins"],
        metrics={},
        log=str(error),
        usage=_sampled(folder, started),
        provenance=made_on(job),
        failure=failure_of(error),
    )
