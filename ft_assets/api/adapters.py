"""Adapters over HTTP: what was trained, from which rows, how good it is, and the hash of every file."""

from datetime import datetime
from typing import Annotated, Any

import pydantic
from fastapi import APIRouter, Query, Request

from bento.protocol import Name
from ft_assets.api.experiments import records
from ft_assets.api.refusals import errors
from ft_assets.api.scope import platform_of, tasks_of
from ft_resources.errors import RequestError

router = APIRouter(tags=["adapters"])
SHORTEST = 8


class Adapter(pydantic.BaseModel):
    """An adapter that a training ended with."""

    digest: str = pydantic.Field(description="SHA-256 over the hashes of its files and what it was made from.")
    task: str
    run_id: str = pydantic.Field(description="MLflow run that made it first: GET /experiments/mlflow/{run_id}.")
    dagster_run_id: str = pydantic.Field(description="GET /runs/{run_id}.")
    training_rows_digest: str = pydantic.Field(description="Dataset it was trained on.")
    base: str
    template: str
    method: str
    accuracy: float | None
    macro_f1: float | None
    loss: float | None
    url: str = pydantic.Field(description="Folder of its files.")
    created: datetime


class Adapters(pydantic.BaseModel):
    """A page of adapters, newest first."""

    data: list[Adapter]
    total: int


class File(pydantic.BaseModel):
    """A file of an adapter."""

    sha256: str
    size: int = pydantic.Field(description="Bytes.")


class Content(Adapter):
    """An adapter with its files, each of which was compared with its hash for this answer."""

    files: dict[str, File]


class Choice(pydantic.BaseModel):
    """Which adapters to list."""

    model_config = pydantic.ConfigDict(extra="forbid")

    task: Name | None = pydantic.Field(None, description="Full name; it need not be declared any more.")
    limit: int = pydantic.Field(100, ge=1, le=1000)
    offset: int = pydantic.Field(0, ge=0, le=10**9)


@router.get("/adapters", summary="List adapters", responses=errors())
def adapters(choice: Annotated[Choice, Query()], request: Request) -> Adapters:
    """Every adapter of the caller's tasks, with where it came from and where it lies."""
    found = _rows(request, choice.task)
    return Adapters(data=found[choice.offset : choice.offset + choice.limit], total=len(found))


@router.get("/adapters/{digest}", summary="Show an adapter", responses=errors(404))
def adapter(digest: str, request: Request) -> Content:
    """An adapter by its digest or the first digits of it, at least 8; its files are verified."""
    found = [one for one in _rows(request, None) if len(digest) >= SHORTEST and one.digest.startswith(digest)]
    if len(found) != 1:
        raise RequestError(
            "unknown_adapter",
            f"{len(found) or 'no'} adapters of yours have a digest that starts with '{digest[:64]}'",
            status=404,
            mend=f"Give at least {SHORTEST} of its first digits; GET /adapters lists them.",
            field="digest",
        )
    stored = platform_of(request).lake.open(found[0].digest)
    return Content(**found[0].model_dump(), files={name: File(**told) for name, told in stored.files.items()})


def _rows(request: Request, task: str | None) -> list[Adapter]:
    """Adapters the caller may see, each as the training that made it first recorded it."""
    platform = platform_of(request)
    found = platform.experiments(tasks_of(request, task)).dropna(subset=["adapter"])
    rows: list[dict[str, Any]] = [dict(row) for row in records(found.drop_duplicates("adapter", keep="last"))]
    return [
        Adapter(
            **{name: row[name] for name in Adapter.model_fields if name in row},
            digest=row["adapter"],
            url=platform.lake.uri(row["adapter"]),
            created=row["ended"],
        )
        for row in rows
    ]
