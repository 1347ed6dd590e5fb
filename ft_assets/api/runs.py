"""Runs over HTTP: submit one, ask after it, cancel it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import pydantic
from fastapi import APIRouter, Query, Request, Response

from bento.auth import permit
from bento.protocol import Name, Text
from bento.protocol import Request as Body
from ft_assets.api.refusals import errors
from ft_assets.api.scope import actor_of, platform_of, tasks_of, unknown_task
from ft_assets.platform import Platform, outcome
from ft_assets.submitting import RUN_ID
from ft_assets.tasks import UnknownTask
from ft_assets.watching import State, UnknownRun
from ft_resources.api_keys import Role
from ft_resources.errors import RequestError

router = APIRouter(tags=["runs"])


class TrainRequest(Body):
    """A run to start."""

    task: Name = pydantic.Field(description="Full name of a task.", examples=["mail-triage"])
    only: list[Name] = pydantic.Field(
        [], max_length=32, description="Assets to make, such as `adapter`; none: from the raw rows to a live release."
    )
    because: Annotated[Text, pydantic.Field(min_length=1, max_length=1000)] = pydantic.Field(
        "submitted through the HTTP API", description="Why; it is recorded with the caller's name."
    )


class Run(pydantic.BaseModel):
    """A run at one moment; null and empty where nothing is known yet."""

    run_id: str
    task_id: str = pydantic.Field(description="The same as `run_id`.")
    task: str
    state: str = pydantic.Field(
        description="`SUBMITTED`, then Dagster's: `STARTING`, `STARTED`, `CANCELING`, `SUCCESS`, `FAILURE`, "
        "`CANCELED`, or `PREEMPTED` of a run that gave way to another one, with the run that goes on once there is one."
    )
    succeeded: bool | None = pydantic.Field(description="null while it runs.")
    stage: str = pydantic.Field("", description="Assets that are being made.")
    training: str | None = pydantic.Field(
        None, description="MLflow run id of the newest training: GET /experiments/mlflow/{run_id}."
    )
    step: int | None = None
    steps: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    metrics: dict[str, float | None] = pydantic.Field({}, description="Newest value of each metric of the training.")
    refusals: list[str] = pydantic.Field([], description="Blocking checks that failed, as `asset.check: reason`.")
    failure: str = pydantic.Field("", description="What the failed step said.")
    resumed_as: str = pydantic.Field("", description="Of a run that gave way to another one: the run that goes on.")


class Runs(pydantic.BaseModel):
    """Runs, newest first."""

    data: list[Run]


class Choice(pydantic.BaseModel):
    """Which runs to list."""

    model_config = pydantic.ConfigDict(extra="forbid")

    task: Name | None = pydantic.Field(None, description="Only those that train and release this task.")
    limit: int = pydantic.Field(20, ge=1, le=200)


@router.post("/train", status_code=202, summary="Start a run", responses=errors(400, 404, 409))
def train(body: TrainRequest, request: Request, response: Response) -> Run:
    """Start a run in a process of its own and answer at once with its id; it goes on when the API ends.

    Takes an owner of the task. A task has one run at a time: 409 while one is under way. The header `Location` names
    where to ask after it.
    """
    permit(request, body.task, "owner")
    platform = platform_of(request)
    try:
        run_id = platform.submit(body.task, only=body.only, because=body.because, actor=actor_of(request))
    except UnknownTask as error:
        raise unknown_task(request, error) from None
    response.headers["location"] = f"/runs/{run_id}"
    return described(platform, state_of(request, run_id))


@router.get("/runs", summary="List runs", responses=errors())
def runs(choice: Annotated[Choice, Query()], request: Request) -> Runs:
    """The newest runs of the caller's tasks, however they were started."""
    platform = platform_of(request)
    states = platform.recent(choice.limit, tasks_of(request, choice.task))
    return Runs(data=[told(state) for state in states])


@router.get("/runs/{run_id}", summary="Ask after a run", responses=errors(404))
def run(run_id: str, request: Request) -> Run:
    """A run as it is now: state, step, metrics; once it is over also which checks refused it, or what failed."""
    return described(platform_of(request), state_of(request, run_id))


@router.get("/task/{task_id}", summary="Ask after a run", responses=errors(404))
def task(task_id: str, request: Request) -> Run:
    """The same as GET /runs/{run_id}: the `task_id` of POST /train is the run's id."""
    return run(task_id, request)


@router.post("/runs/{run_id}/cancel", status_code=202, summary="Cancel a run", responses=errors(404, 409))
def cancel(run_id: str, request: Request) -> Run:
    """Ask a submitted or queued run to end, which takes seconds; what it had made stays. Takes an owner of the task.

    The next run of the task goes on from the training's last checkpoint.
    """
    state_of(request, run_id, "owner")
    platform = platform_of(request)
    return described(platform, platform.cancel(run_id, actor=actor_of(request)))


def state_of(request: Request, run_id: str, role: Role = "reader") -> State:
    """The state of a run of the caller's tasks.

    Args:
        role: The least role it takes.

    Raises:
        RequestError: `unknown_run`; `forbidden`; `tracker_unavailable`.
    """
    try:
        if not RUN_ID.fullmatch(run_id):
            raise UnknownRun("that is no run id")
        with tracker():
            state = platform_of(request).status(run_id)
    except UnknownRun:
        raise RequestError(
            "unknown_run",
            f"there is no run '{run_id[:64]}'",
            status=404,
            mend="Give the run_id that POST /train answered; GET /runs lists them.",
            field="run_id",
        ) from None
    permit(request, state.task, role)
    return state


def described(platform: Platform, state: State) -> Run:
    """A run with why it failed, if it did."""
    if state.succeeded is not False or state.failure:
        return told(state)
    from ft_assets.following import Follower

    ended = outcome(state.run_id, False, list(Follower(platform.instance, state.run_id).lines()))
    return told(state).model_copy(update={"refusals": list(ended.refusals), "failure": ended.failure})


def told(state: State) -> Run:
    """A state as the API tells it."""
    return Run(
        run_id=state.run_id,
        task_id=state.run_id,
        task=state.task,
        state=state.state,
        succeeded=state.succeeded,
        stage=state.stage,
        training=state.training,
        step=state.step,
        steps=state.steps,
        epoch=state.epoch,
        epochs=state.epochs,
        metrics={name: finite(value) for name, value in sorted(state.metrics.items())},
        failure=state.failure,
        resumed_as=state.resumed_as,
    )


def finite(value: float) -> float | None:
    """`value`, or None for what JSON has no number for."""
    return value if math.isfinite(value) else None


@contextmanager
def tracker() -> Iterator[None]:
    """Raises:
    RequestError: `tracker_unavailable`: MLflow could not be asked.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise RequestError(
            "tracker_unavailable", f"MLflow does not answer: {error.error_code}", status=503, mend="Try again later."
        ) from error
