"""MLflow: one run per adapter with its steps, and one registered version per adapter with aliases.

Imports mlflow when used, never at module level, and not in the code location's process before an asset needs it.
"""

import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_resources.errors import ArtefactError

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run

EXPERIMENT_PREFIX = "ft/"
TRAINED_FROM = "trained_from"
"""Tag of a run: digest of everything the adapter is made from, known before it is trained."""
DAGSTER_RUN = "dagster_run_id"
"""Tag of a run: the Dagster run that it was trained in, as dagster-mlflow names it."""
PAGE = 1000


def client(uri: str) -> Any:
    """An `MlflowClient` for `uri`; a SQLite store's folder is created."""
    from mlflow.tracking import MlflowClient

    if not uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    from filelock import FileLock

    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.creation-lock"):  # mlflow creates the tables of a new file without one
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


class TrackedRun:
    """An MLflow run that is being written. One thread sends what was collected about once a second, so that every
    step is seen soon, also while none follows it, and a slow tracker never holds the training up.

    Args:
        live: Asked each time something is sent for further metrics of that moment, such as `Meter.now`.
        resume: Id of a run to go on with; empty: a new one.
    """

    def __init__(
        self,
        uri: str,
        task: str,
        name: str,
        tags: Mapping[str, str],
        *,
        live: Callable[[], Mapping[str, float]] | None = None,
        resume: str = "",
    ) -> None:
        from mlflow.exceptions import MlflowException

        self._client = client(uri)
        experiment = self._client.get_experiment_by_name(EXPERIMENT_PREFIX + task)
        if experiment is not None:
            identity = experiment.experiment_id
        else:
            location = _artifact_location(uri, task)
            try:
                identity = self._client.create_experiment(EXPERIMENT_PREFIX + task, artifact_location=location)
            except MlflowException:  # another run of this task created it meanwhile
                identity = self._client.get_experiment_by_name(EXPERIMENT_PREFIX + task).experiment_id
        if resume:
            self._client.update_run(resume, status="RUNNING")
            self._run = self._client.get_run(resume)
        else:
            self._run = self._client.create_run(identity, run_name=name, tags=dict(tags))
        self.run_id: str = self._run.info.run_id
        self.experiment_id: str = identity
        self._live, self._step = live, 0
        self._buffer: list[Any] = []
        self._collecting, self._sending = threading.Lock(), threading.Lock()
        self._over = threading.Event()
        self._sender = threading.Thread(target=self._send, name="tracker", daemon=True)
        self._sender.start()

    def params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(key, str(value)[:500]) for key, value in values.items()]
        self._client.log_batch(self.run_id, params=entries)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Collect metrics of a step; they are sent within about a second."""
        from mlflow.entities import Metric

        at = int(time.time() * 1000)
        with self._collecting:
            self._step = max(self._step, step)
            self._buffer += [Metric(key, value, at, step) for key, value in values.items()]

    def flush(self) -> None:
        """Send what was collected; what cannot be sent now is kept."""
        with self._sending:
            with self._collecting:
                waiting = list(self._buffer)
            for start in range(0, len(waiting), 1000):
                batch = waiting[start : start + 1000]
                self._client.log_batch(self.run_id, metrics=batch)
                with self._collecting:
                    del self._buffer[: len(batch)]

    def _send(self) -> None:
        from mlflow.exceptions import MlflowException

        while not self._over.wait(1.0):
            if self._live is not None:
                self.metrics(self._live(), self._step)
            # the tracker is away: later sends, and `finish` says it when it stays away
            with suppress(MlflowException):
                self.flush()

    def finish(self, status: str, artifacts: Path | None = None, tags: Mapping[str, str] | None = None) -> None:
        """Close the run as `FINISHED`, `FAILED` or `KILLED` (a search trial that was pruned), with a folder of
        artifacts and further tags."""
        self._over.set()
        self._sender.join()
        self.flush()
        for key, value in (tags or {}).items():
            self._client.set_tag(self.run_id, key, value)
        if artifacts is not None:
            self._client.log_artifacts(self.run_id, str(artifacts), "adapter")
        self._client.set_terminated(self.run_id, status)


def trainings(
    uri: str, *, dagster_run: str | None = None, task: str | None = None, most: int | None = None
) -> "list[Run]":
    """MLflow runs of the platform, newest first.

    Args:
        dagster_run: Only those of this Dagster run, or of those whose id starts so.
        task: Only those of this task.
    """
    of = [each.experiment_id for each in experiments(uri, task)]
    if not of:
        return []
    condition = f"tags.{DAGSTER_RUN} LIKE '{dagster_run}%'" if dagster_run else ""
    newest = {"filter_string": condition, "order_by": ["attributes.start_time DESC"]}
    found: list[Run] = _every(client(uri).search_runs, experiment_ids=of, most=most, **newest)
    return found


def experiments(uri: str, task: str | None = None) -> "list[Experiment]":
    """MLflow experiments of the platform, one a task, newest first; `task`: only this one's."""
    if _nothing_yet(uri):
        return []
    wanted = f"name = '{EXPERIMENT_PREFIX}{task}'" if task else f"name LIKE '{EXPERIMENT_PREFIX}%'"
    found: list[Experiment] = _every(client(uri).search_experiments, filter_string=wanted)
    return found


def training(uri: str, run_id: str) -> "Run | None":
    """The MLflow run of this id, or None."""
    from mlflow.exceptions import MlflowException

    if _nothing_yet(uri) or not re.fullmatch(r"[0-9a-f]{32}", run_id):
        return None
    try:
        found: Run = client(uri).get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return found


def curve(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    """Steps and values of a metric of an MLflow run, in order; empty where it has none of it."""
    history = client(uri).get_metric_history(run_id, metric)
    return [(point.step, point.value) for point in sorted(history, key=lambda point: (point.step, point.timestamp))]


def _nothing_yet(uri: str) -> bool:
    """Whether the store is a file that no training has made yet."""
    return uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists()


def _every(search: Callable[..., Any], *, most: int | None = None, **question: Any) -> list[Any]:
    """All pages of an answer, or its first `most` entries."""
    found, token = list[Any](), None
    while True:
        page = search(**question, max_results=min(most or PAGE, PAGE), page_token=token)
        found += page
        token = page.token
        if not token or (most and len(found) >= most):
            return found[:most]


def end_abandoned(uri: str, dagster_run: str) -> list[str]:
    """Close as failed the runs that a worker of this Dagster run left open when it died.

    Returns:
        Their MLflow run ids, newest first.
    """
    open_runs = [run for run in trainings(uri, dagster_run=dagster_run) if run.info.status == "RUNNING"]
    for run in open_runs:
        client(uri).set_terminated(run.info.run_id, "FAILED")
    return [run.info.run_id for run in open_runs]


def _artifact_location(uri: str, task: str) -> str | None:
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).parent / "artifacts" / task).as_uri()


class ModelRegistry:
    """Registered versions of a task's adapters. The registered name is the task's full name.

    Args:
        uri: MLflow tracking and registry URI.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def version_of(self, task: str, adapter: str) -> str | None:
        """The version that was registered for this adapter digest."""
        found = client(self.uri).search_model_versions(f"name='{task}' and tags.adapter='{adapter}'")
        return str(max(int(version.version) for version in found)) if found else None

    def run_of(self, task: str, trained_from: str) -> str:
        """The MLflow run that trained an adapter, the newest if it was trained more than once.

        Args:
            trained_from: Digest of what the adapter was made from.

        Raises:
            ArtefactError: The tracker does not know one.
        """
        connection = client(self.uri)
        experiment = connection.get_experiment_by_name(EXPERIMENT_PREFIX + task)
        runs = (
            connection.search_runs([experiment.experiment_id], f"tags.{TRAINED_FROM} = '{trained_from}'", max_results=1)
            if experiment is not None
            else []
        )
        if not runs:
            raise ArtefactError(
                f"no MLflow run of task '{task}' was trained from {trained_from[:12]}",
                where=self.uri,
                mend="The tracker was changed or emptied since the training: restore it, or train with another seed.",
            )
        return str(runs[0].info.run_id)

    def register(
        self, task: str, adapter: str, *, run_id: str, source: str, card: Mapping[str, str], tags: Mapping[str, str]
    ) -> str:
        """The version for `adapter`, created unless it exists; the card's files go to the MLflow run, newest card last.

        Returns:
            The version number as a string.
        """
        from mlflow.exceptions import MlflowException

        connection = client(self.uri)
        for name, text in card.items():
            connection.log_text(run_id, text, f"card/{name}")
        existing = self.version_of(task, adapter)
        if existing is not None:
            for key, value in tags.items():
                connection.set_model_version_tag(task, existing, key, value)
            return existing
        try:
            connection.create_registered_model(task, description=f"Adapters of task {task}")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = connection.create_model_version(
            task,
            source=source,
            run_id=run_id,
            tags={"adapter": adapter, **tags},
            description=card.get("model_card.md", "")[:5000],
        )
        return str(version.version)

    def card(self, task: str, version: str) -> dict[str, Any]:
        """The JSON model card of a version.

        Raises:
            ArtefactError: The version has no card.
        """
        from mlflow.artifacts import load_dict
        from mlflow.exceptions import MlflowException

        connection = client(self.uri)
        run_id = connection.get_model_version(task, version).run_id
        location = connection.get_run(run_id).info.artifact_uri
        try:
            card: dict[str, Any] = load_dict(f"{location}/card/model_card.json")
        except MlflowException as error:
            raise ArtefactError(
                f"version {version} of '{task}' has no model card",
                where=self.uri,
                mend="Materialise model_version again.",
            ) from error
        return card

    def set_alias(self, task: str, alias: str, version: str) -> None:
        """Point `alias` at `version`; an alias points at one version, so the earlier one loses it."""
        client(self.uri).set_registered_model_alias(task, alias, version)

    def alias(self, task: str, alias: str) -> str | None:
        """The version that `alias` points at, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return str(client(self.uri).get_model_version_by_alias(task, alias).version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
