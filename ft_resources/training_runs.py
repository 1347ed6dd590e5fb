"""One row for each training that ended, good or not: what it was made from, what it took, what came of it."""

import math
import operator
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, ClassVar, Literal, TypedDict, Unpack

import pandas as pd
import pydantic
import sqlalchemy as sa

from ft_resources.errors import ArtefactError
from ft_resources.ledger_schema import training_runs as table
from ft_resources.ledger_store import LedgerStore

STATUSES = ("FINISHED", "FAILED", "PRUNED")
Grouping = Literal["task", "base", "template", "method", "training_rows_digest"]
GROUPINGS: tuple[Grouping, ...] = ("task", "base", "template", "method", "training_rows_digest")


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One training that ended. Sizes in bytes, times in seconds; None where it is not known.

    The fields from `wall_seconds` to `energy_source` are those of `ft_resources.usage.Usage`.
    """

    __pydantic_config__: ClassVar = pydantic.ConfigDict(use_attribute_docstrings=True)

    run_id: str
    """MLflow run id; of a training that died before it had one, its Dagster run id."""
    dagster_run_id: str
    task: str
    status: str
    """`FINISHED`, `FAILED`, or `PRUNED`: a search trial that was stopped because others were better."""
    trained_from: str
    """Digest of everything the adapter is made from."""
    training_rows_digest: str
    """Digest of the training split."""
    validation_rows_digest: str
    base: str
    """Reference of the base model."""
    base_digest: str
    template: str
    """Recipe, NAME@VERSION."""
    method: str
    """`lora`, `qlora`, ..."""
    started: datetime
    ended: datetime
    adapter: str | None = None
    """Digest of the adapter; None when there is none."""
    device: str | None = None
    precision: str | None = None
    rows: int | None = None
    """Training rows."""
    tokens: int | None = None
    """Tokens trained on over all epochs, without padding."""
    steps: int | None = None
    """Optimiser steps done."""
    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    gpu_seconds: float | None = None
    peak_memory_bytes: int | None = None
    peak_gpu_memory_bytes: int | None = None
    energy_wh: float | None = None
    energy_source: str | None = None
    cost: float | None = None
    """Money, in the currency of the prices it was computed with."""
    accuracy: float | None = None
    """Of the validation rows, as are macro-F1 and loss."""
    macro_f1: float | None = None
    loss: float | None = None
    error: str | None = None
    """Code of the error that ended it, such as `out_of_memory`."""

    def values(self) -> dict[str, Any]:
        """The columns; a number that is not finite is not known.

        Raises:
            ArtefactError: The status is none of `STATUSES`, or a time has no zone.
        """
        if self.status not in STATUSES:
            raise ArtefactError(
                f"a training run cannot be recorded as '{self.status}'",
                where=f"training {self.run_id}",
                mend=f"Record {', '.join(STATUSES)}.",
            )
        if self.started.tzinfo is None or self.ended.tzinfo is None:
            raise ArtefactError(
                "a training run's times have no time zone",
                where=f"training {self.run_id}",
                mend="Pass aware datetimes, such as datetime.now(UTC).",
            )
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class Conditions(TypedDict, total=False):
    """What trainings have to fit; None, as what is not given, asks for nothing."""

    status: str | None
    """`FINISHED`, `FAILED` or `PRUNED`."""
    min_accuracy: float | None
    """On the validation rows; runs without one don't fit."""
    max_seconds: float | None
    """Of wall time; runs without one don't fit."""
    since: datetime | None
    """Started then or later. Aware."""
    until: datetime | None
    """Started before. Aware."""


def select(
    task: str | Collection[str] | None = None,
    *,
    status: str | None = None,
    min_accuracy: float | None = None,
    max_seconds: float | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> sa.Select[Any]:
    """The runs that fit every condition that is given, newest first."""
    columns = table.c
    query = of_tasks(sa.select(table).order_by(columns.started.desc(), columns.run_id), task)
    for column, compare, given in (
        (columns.status, operator.eq, status),
        (columns.accuracy, operator.ge, min_accuracy),
        (columns.wall_seconds, operator.le, max_seconds),
        (columns.started, operator.ge, since),
        (columns.started, operator.lt, until),
    ):
        if given is not None:
            query = query.where(compare(column, given))
    return query


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows of the table as a frame: unknown numbers are NaN, times aware, the other columns objects."""
    found = pd.DataFrame(rows, columns=[column.name for column in table.c])
    for column in table.c:
        if column.name in ("started", "ended"):
            found[column.name] = found[column.name].astype("datetime64[us, UTC]")
        elif isinstance(column.type, sa.Float):
            found[column.name] = found[column.name].astype("float64")
        elif isinstance(column.type, sa.Integer):
            found[column.name] = found[column.name].astype("Int64")
    return found


def of_tasks(query: sa.Select[Any], task: str | Collection[str] | None) -> sa.Select[Any]:
    """Only the runs of one task or of several; None: of all."""
    if task is None:
        return query
    return query.where(table.c.task.in_([task] if isinstance(task, str) else sorted(task)))


def statistics(by: Grouping, task: str | Collection[str] | None) -> sa.Select[Any]:
    """Runs, how they ended, what they reached and what they took, for each value of a column, most runs first."""
    columns = table.c
    runs = sa.func.count().label("runs")

    def ended(status: str) -> sa.ColumnElement[int]:
        return sa.func.sum(sa.case((columns.status == status, 1), else_=0)).label(status.lower())

    query: sa.Select[Any] = sa.select(
        columns[by],
        runs,
        *map(ended, STATUSES),
        sa.func.max(columns.accuracy).label("best_accuracy"),
        sa.func.avg(columns.accuracy).label("mean_accuracy"),
        sa.func.max(columns.macro_f1).label("best_macro_f1"),
        sa.func.avg(columns.wall_seconds).label("mean_seconds"),
        sa.func.sum(columns.wall_seconds).label("seconds"),
        sa.func.max(columns.peak_memory_bytes).label("peak_memory_bytes"),
        sa.func.sum(columns.energy_wh).label("energy_wh"),
        sa.func.sum(columns.cost).label("cost"),
        sa.func.max(columns.started, type_=columns.started.type).label("newest"),
    )
    return of_tasks(query, task).group_by(columns[by]).order_by(runs.desc(), columns[by])


class TrainingRecords(LedgerStore):
    """The training runs in the ledger."""

    def record_training(self, run: TrainingRun) -> None:
        """Store a training that ended; recording the same run again replaces it.

        Raises:
            ArtefactError: An unknown status, or a time without a zone.
        """
        values = run.values()
        with self._write() as connection:
            connection.execute(table.delete().where(table.c.run_id == run.run_id))
            connection.execute(table.insert().values(**values))

    def training_runs(
        self, task: str | Collection[str] | None = None, **conditions: Unpack[Conditions]
    ) -> pd.DataFrame:
        """Trainings that ended and fit every condition given, newest first; columns: fields of `TrainingRun`.

        Args:
            task: One, or several; none of none.
            conditions: See `Conditions`: status, min_accuracy, max_seconds, since, until.
        """
        return frame(self._rows(select(task, **conditions)))

    def training_statistics(self, by: Grouping, task: str | Collection[str] | None = None) -> pd.DataFrame:
        """Trainings counted and summed by a column, most runs first.

        Returns:
            Columns: `by`, runs, finished, failed, pruned, best_accuracy, mean_accuracy, best_macro_f1, mean_seconds,
            seconds, peak_memory_bytes, energy_wh, cost, newest.
        """
        query = statistics(by, task)
        return pd.DataFrame(self._rows(query), columns=[column.name for column in query.selected_columns])
