"""Experiments over HTTP: trainings that ended, filtered and counted, and what MLflow knows of each."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import urlsplit

import pydantic
from fastapi import APIRouter, Query, Request

from bento.auth import permit
from bento.protocol import Name, in_utc
from ft_assets.api.refusals import errors
from ft_assets.api.runs import finite, tracker
from ft_assets.api.scope import platform_of, tasks_of
from ft_assets.grouping import GROUPS, Group, Status
from ft_resources import tracking
from ft_resources.errors import RequestError
from ft_resources.training_runs import TrainingRun

router = APIRouter(tags=["experiments"])


def written(value: Any) -> Any:
    """A time as text; pydantic would take a number for seconds since 1970 too.

    Raises:
        ValueError: It is not ISO 8601.
    """
    try:
        return datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("write a time in ISO 8601, such as 2026-03-01 or 2026-03-01T12:00:00Z") from None


Time = Annotated[datetime, pydantic.BeforeValidator(written), pydantic.AfterValidator(in_utc)]
Amount = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class Filter(pydantic.BaseModel):
    """Which trainings to list: those that fit every condition given."""

    model_config = pydantic.ConfigDict(extra="forbid")

    task: Name | None = pydantic.Field(None, description="Full name; it need not be declared any more.")
    status: Status | None = pydantic.Field(None, description="How it ended.")
    min_accuracy: Amount | None = pydantic.Field(None, description="At least, on the validation rows.")
    max_seconds: Amount | None = pydantic.Field(None, description="It took at most this long.")
    since: Time | None = pydantic.Field(None, description="Started then or later (ISO 8601, UTC without an offset).")
    until: Time | None = pydantic.Field(None, description="Started before.")
    limit: int = pydantic.Field(100, ge=1, le=1000)
    offset: int = pydantic.Field(0, ge=0, le=10**9)


class Experiments(pydantic.BaseModel):
    """A page of trainings, newest first."""

    data: list[TrainingRun]
    total: int = pydantic.Field(description="How many fit, on all pages.")


class Counting(pydantic.BaseModel):
    """What to count trainings by."""

    model_config = pydantic.ConfigDict(extra="forbid")

    by: Group = pydantic.Field(Group.base, description="Base model, dataset (digest of the training rows), ...")
    task: Name | None = pydantic.Field(None, description="Only those of this task.")


class Statistic(pydantic.BaseModel):
    """Trainings that have something in common; null where none of them knows."""

    value: str = pydantic.Field(description="What they have in common.")
    runs: int
    finished: int
    failed: int
    pruned: int
    best_accuracy: float | None
    mean_accuracy: float | None
    best_macro_f1: float | None
    mean_seconds: float | None
    seconds: float | None = pydantic.Field(description="Of all of them together.")
    peak_memory_bytes: int | None
    energy_wh: float | None
    cost: float | None
    newest: datetime


class Statistics(pydantic.BaseModel):
    """The most frequent first."""

    by: Group
    data: list[Statistic]


class TrackedTask(pydantic.BaseModel):
    """The MLflow experiment of a task."""

    task: str
    name: str = pydantic.Field(description="Of the MLflow experiment.")
    experiment_id: str
    runs: int
    newest: str | None = pydantic.Field(description="MLflow run id of the newest: GET /experiments/mlflow/{run_id}.")


class Tracker(pydantic.BaseModel):
    """Where MLflow is, and what it keeps."""

    url: str | None = pydantic.Field(
        description="Its address; null when it is a database of the API's machine, which `ft mlflow` opens."
    )
    data: list[TrackedTask]


class Curve(pydantic.BaseModel):
    """A metric over the steps of a training."""

    steps: list[int]
    values: list[float | None]


class Tracked(pydantic.BaseModel):
    """What MLflow knows of a training."""

    run_id: str
    dagster_run_id: str | None
    task: str
    name: str
    status: str = pydantic.Field(description="MLflow's: `RUNNING`, `FINISHED`, `FAILED`, `KILLED`.")
    started: datetime
    ended: datetime | None
    params: dict[str, str]
    metrics: dict[str, float | None] = pydantic.Field(description="Newest value of each.")
    tags: dict[str, str]
    curves: dict[str, Curve] = pydantic.Field(description="Of the metrics asked for.")


class Wanted(pydantic.BaseModel):
    """What to tell of a training."""

    model_config = pydantic.ConfigDict(extra="forbid")

    curve: list[Name] = pydantic.Field(["loss"], max_length=16, description="Metrics to tell step by step.")


@router.get("/experiments", summary="List experiments", responses=errors())
def experiments(filter: Annotated[Filter, Query()], request: Request) -> Experiments:
    """Every training of the caller's tasks that ended, good or not: what it was made from, took and reached."""
    found = platform_of(request).experiments(
        tasks_of(request, filter.task),
        status=filter.status.value if filter.status else None,
        min_accuracy=filter.min_accuracy,
        max_seconds=filter.max_seconds,
        since=filter.since,
        until=filter.until,
    )
    page = found.iloc[filter.offset : filter.offset + filter.limit]
    return Experiments(data=[TrainingRun(**row) for row in records(page)], total=len(found))


@router.get("/experiments/statistics", summary="Count experiments", responses=errors())
def statistics(counting: Annotated[Counting, Query()], request: Request) -> Statistics:
    """Trainings of the caller's tasks counted and summed by base model, dataset, recipe, method or task."""
    column = GROUPS[counting.by]
    found = platform_of(request).experiment_statistics(column, tasks_of(request, counting.task))
    rows = records(found.rename(columns={column: "value"}))
    return Statistics(by=counting.by, data=[Statistic(**row) for row in rows])


@router.get("/experiments/mlflow/{run_id}", summary="Show an MLflow run", responses=errors(404))
def tracked_run(run_id: str, wanted: Annotated[Wanted, Query()], request: Request) -> Tracked:
    """A training as MLflow knows it, also while it runs: settings, metrics, curves step by step."""
    uri = platform_of(request).environment.mlflow
    with tracker():
        run = tracking.training(uri, run_id)
        if run is None or "task" not in run.data.tags:
            raise RequestError(
                "unknown_run",
                f"MLflow has no training '{run_id[:64]}'",
                status=404,
                mend="GET /experiments lists trainings with their run_id.",
                field="run_id",
            )
        permit(request, run.data.tags["task"])
        curves = {name: tracking.curve(uri, run_id, name) for name in wanted.curve if name in run.data.metrics}
    return Tracked(
        run_id=run.info.run_id,
        dagster_run_id=run.data.tags.get(tracking.DAGSTER_RUN),
        task=run.data.tags["task"],
        name=run.info.run_name,
        status=run.info.status,
        started=run.info.start_time,
        ended=run.info.end_time,
        params=run.data.params,
        metrics={name: finite(value) for name, value in sorted(run.data.metrics.items())},
        tags={name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")},
        curves={
            name: Curve(steps=[step for step, _ in points], values=[finite(value) for _, value in points])
            for name, points in curves.items()
        },
    )


@router.get("/mlflow", summary="List MLflow experiments", responses=errors())
def mlflow(request: Request) -> Tracker:
    """Where MLflow is, and the MLflow experiment of each of the caller's tasks."""
    uri, caller = platform_of(request).environment.mlflow, request.state.caller
    with tracker():
        found = [(each, each.name.removeprefix(tracking.EXPERIMENT_PREFIX)) for each in tracking.experiments(uri)]
        runs = {task: tracking.trainings(uri, task=task) for _, task in found if caller.may_use(task)}
    return Tracker(
        url=_address(uri),
        data=[
            TrackedTask(
                task=task,
                name=each.name,
                experiment_id=each.experiment_id,
                runs=len(runs[task]),
                newest=runs[task][0].info.run_id if runs[task] else None,
            )
            for each, task in found
            if task in runs
        ],
    )


def _address(uri: str) -> str | None:
    """A tracker's address without user and password; None for a database or folder."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return None
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def records(frame: Any) -> list[Mapping[str, Any]]:
    """The rows of a frame, with None for what is not known."""
    found: list[Mapping[str, Any]] = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return found
