"""A restore drill: a backup is restored into a scratch store, and a run read back from it through MLflow is compared
with the same run of the tracker that was backed up."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta

from ft_resources.errors import BackupError
from ft_resources.tracking import client
from ft_resources.tracking_backup import Backup, restore
from ft_resources.tracking_store import TrackingStore, usable


@dataclass(frozen=True)
class RunContent:
    """What a drill compares of a run."""

    params: dict[str, str]
    metrics: dict[str, list[tuple[int, int, str]]]
    """Step, time (ms) and value of every point by metric."""
    artifacts: dict[str, str]
    """SHA-256 by path."""
    versions: list[str]
    """Registered versions that name this run, as NAME/VERSION."""


@dataclass(frozen=True)
class Drill:
    """A drill that succeeded."""

    run_id: str
    content: RunContent
    seconds: float
    """From the first byte of the backup to the last comparison."""
    age: timedelta
    """How old the backup is."""
    versioned: bool | None
    """Whether the store of artefacts keeps versions; None where it does not tell."""


def drill(found: Backup, source: TrackingStore, *, run_id: str | None = None) -> Drill:
    """Restore a backup beside its tracker, read a run back, and remove the copy.

    Args:
        source: The tracker that was backed up. Nothing in it changes; on a PostgreSQL server a database is created
            for the time of the drill.
        run_id: The MLflow run to read; default that of the newest registered version, else the newest that ended.

    Raises:
        BackupError: The backup cannot be restored, the run came back different, or the artefacts are neither in the
            backup nor kept in versions.
    """
    started = time.monotonic()
    with usable(source.artifacts):
        versioned = source.artifacts.versioned()
    if found.database_only and versioned is False:
        raise BackupError(
            "the artefacts are not in the backup, and their bucket does not keep versions",
            where=source.artifacts.url,
            mend="Switch versioning on, or back the artefacts up too.",
        )
    with source.scratch() as scratch, _mlflow(source), usable(source.artifacts):
        restore(found, scratch)
        chosen = run_id or _sample(scratch)
        content = _content(scratch, chosen, artifacts=not found.database_only)
        original = _content(source, chosen, artifacts=not found.database_only)
    different = [one.name for one in fields(RunContent) if getattr(content, one.name) != getattr(original, one.name)]
    if different:
        raise BackupError(
            f"run {chosen} came back with other {', '.join(different)}",
            where=found.folder.url,
            mend="It was changed after the backup, or the backup is no good: drill with one made now.",
        )
    age = datetime.now(UTC) - found.created_at
    return Drill(chosen, content, time.monotonic() - started, age, versioned)


def _sample(store: TrackingStore) -> str:
    tracker = client(store.database)
    for version in tracker.search_model_versions(order_by=["creation_timestamp DESC"], max_results=100):
        if version.run_id:
            return str(version.run_id)
    experiments = [one.experiment_id for one in tracker.search_experiments()]
    ended = "attributes.status != 'RUNNING'"
    runs = tracker.search_runs(experiments, ended, order_by=["attributes.end_time DESC"], max_results=1)
    if not runs:
        raise BackupError("the backup holds no run that ended", where=store.name, mend="Train something first.")
    return str(runs[0].info.run_id)


def _content(store: TrackingStore, run_id: str, *, artifacts: bool) -> RunContent:
    tracker = client(store.database)
    run = tracker.get_run(run_id)
    below = store.path_of(run.info.artifact_uri) if artifacts else None
    folder = store.artifacts.below(below) if below else None
    return RunContent(
        params=run.data.params,
        metrics={
            key: sorted((one.step, one.timestamp, repr(one.value)) for one in tracker.get_metric_history(run_id, key))
            for key in run.data.metrics
        },
        artifacts={name: folder.digest(name) for name in folder.names()} if folder else {},
        versions=sorted(f"{one.name}/{one.version}" for one in tracker.search_model_versions(f"run_id='{run_id}'")),
    )


@contextmanager
def _mlflow(source: TrackingStore) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        said = str(error).partition("\n")[0]
        raise BackupError(
            f"MLflow cannot read the run: {said}",
            where=source.name,
            mend="Drill with the version of MLflow that the tracking server has, and with a run that it knows.",
        ) from error
