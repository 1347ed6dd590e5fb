"""The Python asset API: open the platform, add a task, materialise it, read its report, predict, trace.

from ft_assets.platform import Platform

platform = Platform.open()
platform.add_task("my-task.yaml")
platform.materialise("my-task")
print(platform.report("my-task").models["candidate"])
answer = platform.predict("my-task", ["some text"])[0]
print(answer.label, platform.trace(answer.prediction_id).rows)
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ft_assets import lineage, task_files
from ft_assets.daemon import daemon
from ft_assets.deploying import Deployment, Deployments
from ft_assets.evaluation.stored import Report, read_report
from ft_assets.home import Home
from ft_assets.release import decisions
from ft_assets.runs import TRAINING_ASSETS, Outcome, PlatformBusy, Runs, outcome
from ft_assets.tasks import Task
from ft_assets.training import recipes
from ft_resources.environments import Environment, ServiceSettings
from ft_resources.errors import ArtefactError
from ft_resources.serving import SERVICE, ServerProcess

if TYPE_CHECKING:
    import pandas as pd

    from bento.request_log import Prediction
    from bento.scorer import Scorer
    from ft_assets.exporting.forms import Exported
    from ft_assets.file_scoring import Scored as ScoredFile
    from ft_assets.following import Line
    from ft_assets.training.forms import Level
    from ft_assets.training.planning.plan import Plan
    from ft_assets.training.reproduce import Reproduction
    from ft_assets.watching import State, Watched
    from ft_resources.training_runs import Conditions, Grouping

__all__ = ["TRAINING_ASSETS", "Outcome", "Platform", "PlatformBusy", "outcome"]


class Platform(Home):
    """One platform home: its tasks, stores, Dagster instance and live releases.

    Args:
        environment: Where everything is; `Platform.open` reads it.
    """

    @classmethod
    def open(cls, home: str | Path | None = None) -> "Platform":
        """The platform at `home` (default `FT_HOME`, else `.ft` here), created when it is not there."""
        return cls(Environment.read(home=home))

    @cached_property
    def _runs(self) -> Runs:
        return Runs(self)

    # -- tasks --------------------------------------------------------------------------------------------------

    def check_task(self, path: str | Path) -> tuple[Task, recipes.Merged]:
        """Validate a task file with its recipe and base model, or plug-in trainer.

        Raises:
            SpecError: Naming file, line, field, what was expected and the nearest valid name.
        """
        return task_files.check(self.lake, path)

    def add_task(self, path: str | Path) -> Task:
        """Validate a task file, keep a copy in `FT_HOME/tasks` and add its partition.

        Relative source URLs become absolute in the copy, so that they mean the same files.

        Raises:
            SpecError: As `check_task`; or another file declares a task of that name.
        """
        return task_files.add(self, path)

    def published_recipes(self) -> list[recipes.Recipe]:
        """Every published recipe."""
        return [recipes.load(reference).recipe for reference in recipes.known()]

    def recipe_form(self, name: str, level: "Level" = "basic") -> dict[str, Any]:
        """The form that fills in a recipe, as JSON Schema; `forms.from_form` takes what was filled in.

        Args:
            name: NAME@VERSION.
            level: `basic`: five fields at most; `advanced`: every setting.

        Raises:
            SpecError: There is no such recipe, or no such level.
        """
        from ft_assets.training.forms import form

        return form(name, level)

    # -- runs ---------------------------------------------------------------------------------------------------

    def materialise(
        self,
        task: str,
        *,
        only: Sequence[str] = (),
        because: str = "asked for through the Python API",
        show: "Callable[[Line], None] | None" = None,
        run_id: str | None = None,
    ) -> Outcome:
        """Run the graph of one task, from its raw rows to a live release.

        What the service cannot serve is trained: the run of a task that asks for full fine-tuning or for DoRA ends with
        what was trained, that of a plug-in trainer with its evaluation, and `Outcome.unserved` says why.

        Args:
            only: Asset names to materialise; empty for all of stages 1 to 4.
            show: Called with every line of progress.
            run_id: A UUID for the Dagster run; default a new one.

        Raises:
            SpecError: There is no such task, or no such asset.
            PlatformBusy: Another run works on this task.
        """
        return self._runs.materialise(task, only=only, because=because, show=show, run_id=run_id)

    def submit(
        self,
        task: str,
        *,
        only: Sequence[str] = (),
        because: str = "submitted through the Python API",
        actor: str | None = None,
    ) -> str:
        """Start a run like `materialise` in a process that outlives this one, and return its id at once.

        Follow it with `status` or `watched`; what it prints is kept in `FT_HOME/submitted/RUN/log.txt`.

        Args:
            only: As of `materialise`.
            actor: Who asks for it; default whom the environment names.

        Raises:
            SpecError: There is no such task (`UnknownTask`), or no such asset.
            PlatformBusy: Another run works on it.
        """
        return self._runs.submit(task, only=only, because=because, actor=actor)

    def cancel(self, run: str, *, actor: str | None = None) -> "State":
        """Ask a submitted or queued run to end, which takes seconds: follow it with `status`. What it had made stays.

        A run that gave way to another one does not go on then.

        Args:
            run: Its id, or the start of one.
            actor: Who asks for it; default whom the environment names.

        Raises:
            UnknownRun: As of `watched`.
            CannotCancel: The run is over, was started in a process of its caller, or is a process of another machine.
        """
        return self._runs.cancel(run, actor=actor)

    def status(self, run: str) -> "State":
        """A run as it is now, also one that was submitted a moment ago.

        A submitted run whose process is gone has failed, and is told to Dagster as such.

        Args:
            run: As of `watched`.

        Raises:
            UnknownRun: No run is called so, or several ids start so.
        """
        return self._runs.status(run)

    def recent(self, most: int = 10, tasks: Collection[str] | None = None) -> "list[State]":
        """The newest runs, those among them that were submitted and have not begun.

        Args:
            tasks: Only runs of these.
        """
        return self._runs.recent(most, tasks)

    def monitor(self, task: str, day: str, *, show: "Callable[[Line], None] | None" = None) -> Outcome:
        """Compact and judge one day (ISO) of a task's traffic."""
        return self._runs.monitor(task, day, show=show)

    def watched(self, run: str) -> "Watched":
        """A run to watch: Dagster run id or the start of one, task name (its newest run), or MLflow run id.

        One that was submitted a moment ago is waited for, until its process has begun it.

        Raises:
            UnknownRun: No run is called so, or several ids start so; it lists the newest ones. Or a submitted run's
                process ended before it began.
        """
        return self._runs.watched(run)

    # -- reading ------------------------------------------------------------------------------------------------

    def report(self, task: str) -> Report:
        """The newest evaluation report of a task."""
        return read_report(self.lake, self.tasks.get(task).name)[1]

    def report_page(self, task: str) -> Path:
        """The newest report as a self-contained HTML page."""
        return read_report(self.lake, self.tasks.get(task).name)[0].path("report.html")

    def experiments(
        self, task: str | Collection[str] | None = None, **conditions: "Unpack[Conditions]"
    ) -> "pd.DataFrame":
        """Trainings that ended, newest first: what each was made from, took and reached.

        Args:
            task: Only those of this task, or of these; they need not be declared any more.
            conditions: status, min_accuracy, max_seconds, since, until; see `training_runs.Conditions`.
        """
        return self.ledger.training_runs(task, **conditions)

    def experiment_statistics(self, by: "Grouping", task: str | Collection[str] | None = None) -> "pd.DataFrame":
        """Trainings counted and summed by base model, dataset, ...; see `Ledger.training_statistics`."""
        return self.ledger.training_statistics(by, task)

    def live(self, task: str) -> dict[str, Any] | None:
        """The release that answers now."""
        return self.ledger.live_release(self.tasks.get(task).name)

    def history(self, task: str) -> list[dict[str, Any]]:
        """Every release decision, oldest first.

        Raises:
            ArtefactError: The audit chain shows that the record was changed after the fact.
        """
        self.ledger.audit_events(task)
        return self.ledger.releases(self.tasks.get(task).name)

    def live_at(self, task: str, moment: datetime) -> dict[str, Any] | None:
        """The route that was in force at `moment`."""
        return self.ledger.live_at(self.tasks.get(task).name, moment)

    def trace(self, prediction_id: str) -> lineage.Trace:
        """From an answer to the rows behind it."""
        return lineage.trace(self.lake, self.ledger, prediction_id)

    def trace_row(self, task: str, row_id: str) -> dict[str, Any]:
        """From a row to the adapters that were trained on it."""
        return lineage.trace_row(self.lake, self.ledger, self.tasks.get(task).name, row_id)

    # -- answering ----------------------------------------------------------------------------------------------

    @cached_property
    def _scorer(self) -> "Scorer":
        from bento.scorer import Scorer

        return Scorer.of(self.environment, ServiceSettings.read(), self.lake, self.ledger)

    def predict(
        self,
        task: str,
        inputs: Sequence[str],
        *,
        model_version: str | None = None,
        user: str | None = None,
        event_time: datetime | None = None,
    ) -> "list[Prediction]":
        """Answers of the live release in this process, logged like those of the service.

        Raises:
            RequestError: Nothing is live, or the request is not valid.
        """
        return self._scorer.predict(task, inputs, model_version=model_version, user=user, event_time=event_time)

    def predict_file(
        self,
        task: str,
        file: str | Path,
        out: str | Path | None = None,
        *,
        column: str = "text",
        model_version: str | None = None,
        show: Callable[[int, int], None] = lambda done, failed: None,
    ) -> "ScoredFile":
        """Answers of the live release beside every row of a CSV, JSONL or Parquet file; see `file_scoring.score_file`.

        Args:
            out: Default: beside `file`.
            column: Holds the input.
            show: Told how many rows are done and how many of them failed.

        Raises:
            SourceError: The file is missing or lacks the column.
            RequestError: Nothing is live, or the log cannot be written; a repeated call goes on where this one ended.
        """
        from ft_assets.file_scoring import score_file

        return score_file(
            self._scorer,
            task,
            Path(file),
            None if out is None else Path(out),
            column=column,
            model_version=model_version,
            show=show,
        )

    def export(self, task: str, out: str | Path, *, version: str | None = None, int8: bool = False) -> "Exported":
        """Write a released classifier as ONNX to the folder `out`, compared with plain peft on the validation rows.

        Args:
            out: Not there yet, or empty. It appears whole or not at all.
            version: A released model version, or the start of its adapter's digest; default the live one.
            int8: Weights in 8 bits.

        Raises:
            GateRefusal: It answers otherwise than the task's gates for serving precisions allow.
            RequestError: There is no such version.
            ArtefactError: Nothing is live, or `out` cannot be written.
            ServiceError: The packages of the extra `export` are missing, or this base model cannot be written as ONNX.
            SpecError: There is no such task, or it is no text-classification.
        """
        from ft_assets.exporting.export import export

        return export(self, task, Path(out), version=version, int8=int8)

    def serve(self, port: int | None = None) -> ServerProcess:
        """Start the service on this home in a process of its own; the caller stops it."""
        return self.bentos.start(SERVICE, home=self.environment.home, port=port)

    @cached_property
    def deployments(self) -> Deployments:
        """What answers for the tasks of this home."""
        return Deployments(self.environment, self.bentos)

    def deploy(self, task: str) -> Deployment:
        """An address that answers for the live release of `task`, and a page to try it on.

        It is the service of FT_SERVICE_URL, else one of this home on this machine: it is found when it runs, or started
        in a process that outlives this one, and answers until `undeploy`.

        Raises:
            NothingLive: No release of it is in force.
            ServiceError: The service did not come up, or cannot load the adapter.
        """
        return self.deployments.deploy(self.ledger, task)

    def undeploy(self) -> bool:
        """End the service that `deploy` started, for all tasks. Returns whether there was one.

        Raises:
            CannotStop: Somebody else started it.
        """
        return self.deployments.stop()

    def daemon(self) -> AbstractContextManager[Path]:
        """A `dagster-daemon` on this home while the body runs: sensors tick, queued runs start. Yields its log file."""
        return daemon(self.environment)

    # -- training -----------------------------------------------------------------------------------------------

    def plan(self, task: str) -> "Plan":
        """What a training of a task will take: tokens, memory, time, money; LoRA beside full fine-tuning.

        Raises:
            SpecError: There is no such task, or its base model is not there.
        """
        from ft_assets.training.planning.plan import plan

        return plan(self.lake, self.ledger, self.environment, self.tasks.get(task))

    def reproduce(self, adapter: str, *, show: Callable[[str], None] = lambda line: None) -> "Reproduction":
        """Train an adapter again from what it was made from, and compare every tensor.

        Args:
            adapter: Its digest, the start of it, or a task's name for the newest of that task.
            show: Told of the steps.

        Raises:
            ArtefactError: There is no such adapter, or its base model is another one now.
        """
        from ft_assets.training.reproduce import reproduce

        names = self.tasks.load()[0]
        digest = self.lake.require(adapter, "adapter").digest if adapter in names else self._adapter(adapter)
        return reproduce(self.lake, self.environment, digest, show)

    def _adapter(self, start: str) -> str:
        trained = [digest for digest in self.experiments()["adapter"].dropna().unique() if digest.startswith(start)]
        if len(trained) != 1 or not start:
            raise ArtefactError(
                f"{len(trained)} adapters have a digest that starts with '{start}'" if start else "no adapter is named",
                where=self.environment.lake,
                mend="Give more of its digest, or a task's name; `ft experiments` lists adapters.",
            )
        return str(trained[0])

    # -- deciding -----------------------------------------------------------------------------------------------

    def approve(self, task: str, *, because: str) -> dict[str, Any]:
        """Overrule the gates for the newest candidate, recorded with actor and reason, and release it.

        Raises:
            GateRefusal: No reason was given, or the artefacts do not belong together.
        """
        return decisions.approve(self, self._runs, task, because=because)

    def roll_back(self, task: str, *, to: str | None = None, because: str) -> dict[str, Any]:
        """Make an earlier release's adapter live again.

        Raises:
            GateRefusal: There is none.
        """
        return decisions.roll_back(self, task, to=to, because=because)
