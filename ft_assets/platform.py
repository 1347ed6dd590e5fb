"""The Python asset API: open the platform, add a task, materialise it, read its report, predict, trace.

from ft_assets.platform import Platform

platform = Platform.open()
platform.add_task("my-task.yaml")
platform.materialise("my-task")
print(platform.report("my-task").models["candidate"])
answer = platform.predict("my-task", ["some text"])[0]
print(answer.label, platform.trace(answer.prediction_id).rows)
"""

import difflib
import io
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_assets import lineage
from ft_assets.evaluation.servable import unserved
from ft_assets.evaluation.stored import Report, read_report
from ft_assets.release import promotion
from ft_assets.submitting import CannotCancel, Submission, Submissions
from ft_assets.tasks import FilesSource, Task, TaskFolders
from ft_assets.training import recipes
from ft_assets.training.continuing import check_incremental
from ft_assets.training.failures import failed_results
from ft_assets.training.jobs import ACTOR
from ft_assets.training.searching import trials as search
from ft_resources.base_models import resolve as resolve_base
from ft_resources.environments import REPOSITORY, Environment, ServiceSettings
from ft_resources.errors import ArtefactError, FtError, GateRefusal, SpecError
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger
from ft_resources.serving import SERVICE, BentoStore, ServerProcess
from ft_resources.tracking import ModelRegistry

if TYPE_CHECKING:
    import dagster as dg
    import pandas as pd

    from bento.request_log import Prediction
    from bento.scorer import Scorer
    from ft_assets.file_scoring import Scored as ScoredFile
    from ft_assets.following import Line
    from ft_assets.training.forms import Level
    from ft_assets.training.planning.plan import Plan
    from ft_assets.training.reproduce import Reproduction
    from ft_assets.watching import State, Watched
    from ft_resources.training_runs import Grouping


TRAINING_ASSETS = (
    "raw_dataset",
    "clean_dataset",
    "train_split",
    "validation_split",
    "test_split",
    "search_results",
    "adapter",
)
"""Stages 1 and 2: rows to an adapter."""


class PlatformBusy(FtError):
    """Another run works on the same partition."""

    code = "busy"


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run_id: str
    succeeded: bool
    refusals: tuple[str, ...]
    """Blocking checks that failed, as `asset.check: reason`."""
    failure: str
    """What the failed step said; empty without one."""
    results: Path | None = None
    """Folder that describes a training that failed: failure.json, logs, curve of resources."""
    unserved: str = ""
    """Why the run was to end with what was trained, without evaluation and release; empty where it was not."""


def _unserved(task: Task) -> str:
    settings = recipes.resolve(task).settings
    return unserved(settings.method, dora=settings.lora.use_dora)


class Platform:
    """One platform home: its tasks, stores, Dagster instance and live releases.

    Args:
        environment: Where everything is; `Platform.open` reads it.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        environment.export()
        environment.dagster_home.mkdir(parents=True, exist_ok=True)
        configuration = environment.dagster_home / "dagster.yaml"
        if not configuration.exists():
            shutil.copyfile(REPOSITORY / "deployments" / "local" / "dagster.yaml", configuration)

    @classmethod
    def open(cls, home: str | Path | None = None) -> "Platform":
        """The platform at `home` (default `FT_HOME`, else `.ft` here), created when it is not there."""
        return cls(Environment.read(home=home))

    @cached_property
    def lake(self) -> Lake:
        return Lake(self.environment.lake)

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.environment.ledger)

    @cached_property
    def registry(self) -> ModelRegistry:
        return ModelRegistry(self.environment.mlflow)

    @cached_property
    def bentos(self) -> BentoStore:
        return BentoStore(self.environment)

    @cached_property
    def _submissions(self) -> Submissions:
        return Submissions(self.environment)

    @cached_property
    def instance(self) -> "dg.DagsterInstance":
        """The Dagster instance that the UI and the daemon share."""
        import dagster as dg
        from filelock import FileLock

        with FileLock(self.environment.dagster_home / "creation.lock"):  # dagster creates its tables without one
            instance = dg.DagsterInstance.from_config(str(self.environment.dagster_home))
            instance.get_run_ids(limit=1)
        return instance

    # -- tasks --------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> TaskFolders:
        return TaskFolders(self.environment.task_folders)

    def check_task(self, path: str | Path) -> tuple[Task, recipes.Resolved]:
        """Validate a task file with its recipe and base model.

        Raises:
            SpecError: Naming file, line, field, what was expected and the nearest valid name.
        """
        task = Task(Path(path))
        resolved = recipes.resolve(task)
        recipes.require_published(self.lake, resolved.template, publish=False)
        search.check_space(task, resolved)
        check_incremental(task, resolved)
        resolve_base(resolved.settings.base.model)
        return task, resolved

    def add_task(self, path: str | Path) -> Task:
        """Validate a task file, keep a copy in `FT_HOME/tasks` and add its partition.

        Relative source URLs become absolute in the copy, so that they mean the same files.

        Raises:
            SpecError: As `check_task`; or another file declares a task of that name.
        """
        task, _ = self.check_task(path)
        target = self.environment.home / "tasks" / f"{task.name}.yaml"
        known = self.tasks.load()[0].get(task.name)
        if known is not None and known.path.resolve() not in (target.resolve(), task.path.resolve()):
            raise SpecError(
                f"task '{task.name}' is declared already in {known.path}", where=str(path), mend="Rename it."
            )
        if known is None or known.path.resolve() == target.resolve() != task.path.resolve():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_with_absolute_urls(task), encoding="utf-8")
        self.instance.add_dynamic_partitions("task", [task.name])
        self.ledger.audit(self.environment.actor, "add_task", task.name, task.path.name, {})
        return self.tasks.get(task.name)

    def published_recipes(self) -> list[recipes.Recipe]:
        """Every published recipe."""
        return [recipes.load(reference)[1] for reference in recipes.known()]

    def recipe_form(self, name: str, level: "Level" = "basic") -> dict[str, Any]:
        """The form that fills in a recipe, as JSON Schema; `recipes.from_form` takes what was filled in.

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
        what was trained, and `Outcome.unserved` says why.

        Args:
            only: Asset names to materialise; empty for all of stages 1 to 4.
            show: Called with every line of progress.
            run_id: A UUID for the Dagster run; default a new one.

        Raises:
            SpecError: There is no such task, or no such asset.
            PlatformBusy: Another run works on this task.
        """
        found = self.tasks.get(task)
        name = found.name
        why = "" if only else _unserved(found)
        if why:
            only = TRAINING_ASSETS
        _check_assets(only)
        self.instance.add_dynamic_partitions("task", [name])
        return replace(
            self._execute("train_and_release", name, only, {"ft/because": because}, show, run_id), unserved=why
        )

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
        name, actor = self.tasks.get(task).name, actor or self.environment.actor
        _check_assets(only)
        with self._submissions.turn():
            for one in self._submissions.all():
                if one.task == name and one.is_here and one.alive and not self._is_finished(one):
                    raise self._busy(name, one.run_id)
            self._require_idle(name)
            run_id = self._submissions.start(name, only, because, actor).run_id
        self.ledger.audit(actor, "submit", name, run_id, {"only": list(only), "because": because})
        return run_id

    def cancel(self, run: str, *, actor: str | None = None) -> "State":
        """Ask a submitted run to end; what it had made until then stays. It takes seconds: follow it with `status`.

        Args:
            run: Its id, or the start of one.
            actor: Who asks for it; default whom the environment names.

        Raises:
            UnknownRun: As of `watched`.
            CannotCancel: The run is over, was not submitted, or is a process of another machine.
        """
        state, submission, actor = self.status(run), self._submissions.find(run), actor or self.environment.actor
        if state.succeeded is not None or submission is None:
            raise CannotCancel(
                f"run {state.run_id} is over" if submission else f"run {state.run_id} was not submitted",
                where=f"task {state.task}",
                mend="There is nothing to cancel." if submission else "End it where it was started, or in the UI.",
            )
        begun = self.instance.get_run_by_id(submission.run_id)
        if begun is not None:
            self.instance.report_run_canceling(begun, f"Canceled by {actor}.")
        submission.cancel(actor)
        self.ledger.audit(actor, "cancel", submission.task, submission.run_id, {})
        return self.status(submission.run_id)

    def status(self, run: str) -> "State":
        """A run as it is now, also one that was submitted a moment ago.

        A submitted run whose process is gone has failed, and is told to Dagster as such.

        Args:
            run: As of `watched`.

        Raises:
            UnknownRun: No run is called so, or several ids start so.
        """
        submission = self._submissions.find(run)
        if submission is None:
            return self.watched(run).read()
        if not submission.alive:
            self._bury(submission)
        begun = self.instance.has_run(submission.run_id)
        return self.watched(run).read() if begun else _before_it_began(submission)

    def recent(self, most: int = 10, tasks: Collection[str] | None = None) -> "list[State]":
        """The newest runs, those among them that were submitted and have not begun.

        Args:
            tasks: Only runs of these.
        """
        import dagster as dg

        from ft_assets.watching import State

        wanted = dg.RunsFilter(tags={"dagster/partition": sorted(tasks)}) if tasks is not None else None
        records = self.instance.get_run_records(wanted, limit=most) if tasks is None or tasks else []
        found = [(record.create_timestamp, State.of(record.dagster_run)) for record in records]
        submitted = (one for one in self._submissions.all() if tasks is None or one.task in tasks)
        found += [
            (datetime.fromisoformat(one.submitted), _before_it_began(one))
            for one in islice(submitted, most)
            if not self.instance.has_run(one.run_id)
        ]
        return [state for _, state in sorted(found, key=lambda one: one[0], reverse=True)[:most]]

    def _is_finished(self, submission: Submission) -> bool:
        """Whether its run is over, whose process may take a moment longer."""
        run = self.instance.get_run_by_id(submission.run_id)
        return run is not None and run.is_finished

    def _bury(self, submission: Submission) -> None:
        """Close the run of a process that ended without doing so: it would keep its task busy for ever."""
        run = self.instance.get_run_by_id(submission.run_id)
        if run is None or run.is_finished:
            return
        if submission.canceled_by:
            self.instance.report_run_canceled(run, f"Canceled by {submission.canceled_by}.")
        else:
            self.instance.report_run_failed(run, f"its process ended: {submission.last_words()}")

    def monitor(self, task: str, day: str, *, show: "Callable[[Line], None] | None" = None) -> Outcome:
        """Compact and judge one day (ISO) of a task's traffic."""
        from ft_assets.partitions import FIRST_DAY, monitoring_key

        name = self.tasks.get(task).name
        try:
            known = FIRST_DAY <= date.fromisoformat(day).isoformat() <= datetime.now(UTC).date().isoformat()
        except ValueError:
            known = False
        if not known:
            raise SpecError(
                f"'{day}' is not a day with traffic", where="day", mend=f"Give an ISO day from {FIRST_DAY} to today."
            )
        return self._execute("monitor_day", monitoring_key(name, day), (), {}, show)

    def _require_idle(self, key: str) -> None:
        import dagster as dg

        from ft_assets.automation import ACTIVE

        others = self.instance.get_runs(dg.RunsFilter(statuses=ACTIVE, tags={"dagster/partition": key}), limit=1)
        if others:
            raise self._busy(key, others[0].run_id)

    def _busy(self, key: str, run_id: str) -> PlatformBusy:
        return PlatformBusy(
            f"run {run_id} of '{key}' is under way",
            where=f"task {key}",
            mend=f"Wait for it, or end it: ft cancel {run_id[:8]} if it was submitted, else in the UI.",
        )

    def _execute(
        self,
        job: str,
        key: str,
        only: Sequence[str],
        tags: dict[str, str],
        show: "Callable[[Line], None] | None",
        run_id: str | None = None,
    ) -> Outcome:
        import dagster as dg

        from ft_assets.definitions import defs
        from ft_assets.following import Line, following

        self._require_idle(str(key))
        run_id, seen = run_id or str(uuid.uuid4()), list[Line]()

        def watch(line: Line) -> None:
            seen.append(line)
            if show is not None:
                show(line)

        with following(self.instance, run_id, watch):
            result = defs.resolve_job_def(job).execute_in_process(
                run_id=run_id,
                partition_key=key,
                instance=self.instance,
                tags={ACTOR: self.environment.actor, **tags},
                asset_selection=[dg.AssetKey(name) for name in only] or None,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                raise_on_error=False,
            )
        ended = outcome(run_id, result.success, seen)
        return ended if ended.succeeded else replace(ended, results=failed_results(self.environment, str(key), run_id))

    def watched(self, run: str) -> "Watched":
        """A run to watch: Dagster run id or the start of one, task name (its newest run), or MLflow run id.

        One that was submitted a moment ago is waited for, until its process has begun it.

        Raises:
            UnknownRun: No run is called so, or several ids start so; it lists the newest ones. Or a submitted run's
                process ended before it began.
        """
        from ft_assets.watching import UnknownRun, Watched

        submission = self._submissions.find(run)
        while submission is not None and not self.instance.has_run(submission.run_id):
            if not submission.alive:
                raise UnknownRun(
                    f"run {submission.run_id} ended before it began: {submission.last_words()}",
                    where=str(submission.log),
                    mend="Mend that and submit again.",
                )
            time.sleep(0.2)
        return Watched(self.environment.mlflow, self.instance, run)

    # -- reading ------------------------------------------------------------------------------------------------

    def report(self, task: str) -> Report:
        """The newest evaluation report of a task."""
        return read_report(self.lake, self.tasks.get(task).name)[1]

    def report_page(self, task: str) -> Path:
        """The newest report as a self-contained HTML page."""
        return read_report(self.lake, self.tasks.get(task).name)[0].path("report.html")

    def experiments(
        self,
        task: str | Collection[str] | None = None,
        *,
        status: str | None = None,
        min_accuracy: float | None = None,
        max_seconds: float | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> "pd.DataFrame":
        """Trainings that ended, newest first: what each was made from, took and reached.

        Args:
            task: Only those of this task, or of these; they need not be declared any more.
            status: `FINISHED`, `FAILED` or `PRUNED`.
            min_accuracy: On the validation rows.
            max_seconds: Of wall time.
            since: Started then or later; `until`: started before. Aware datetimes.
        """
        return self.ledger.training_runs(
            task, status=status, min_accuracy=min_accuracy, max_seconds=max_seconds, since=since, until=until
        )

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

    def serve(self, port: int | None = None) -> ServerProcess:
        """Start the service on this home in a process of its own; the caller stops it."""
        return self.bentos.start(SERVICE, home=self.environment.home, port=port)

    @contextmanager
    def daemon(self) -> Iterator[Path]:
        """A `dagster-daemon` on this home while the body runs: sensors tick, queued runs start. Yields its log file."""
        log = self.environment.home / "daemon.log"
        program = str(Path(sys.executable).with_name("dagster-daemon"))
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [program, "run", "-w", str(REPOSITORY / "workspace.yaml")],
                cwd=REPOSITORY,
                env={**os.environ, **self.environment.variables()},
                stdout=sink,
                stderr=sink,
            )
        try:
            yield log
        finally:
            process.terminate()
            process.wait(timeout=60)

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
        spec = self.tasks.get(task).spec
        if not because.strip():
            raise GateRefusal(
                "an approval needs a reason", where=f"task {spec.full_name}", mend="Say why with --because."
            )
        self._complete(spec.full_name)
        engine = self.environment.generation_engine
        candidate = promotion.examine(self.lake, self.ledger, spec, engine=engine)
        live = self.ledger.live_release(spec.full_name)
        if live is not None and live["adapter"] == candidate.adapter:
            raise GateRefusal(
                f"version {live['model_version']} is live already, nothing was recorded",
                where=f"approval for {spec.full_name}",
                mend="There is nothing to overrule.",
            )
        self.ledger.approve(
            task=spec.full_name,
            adapter=candidate.adapter,
            report=candidate.report,
            actor=self.environment.actor,
            because=because,
        )
        release, _ = promotion.release(
            self.lake, self.ledger, spec, actor=self.environment.actor, because=because, engine=engine
        )
        self.registry.set_alias(spec.full_name, "champion", release["model_version"])
        return release

    def _complete(self, task: str) -> None:
        """Register and build the newest evaluated adapter: a run that a gate stopped did not get that far.

        Raises:
            GateRefusal: That failed.
        """
        report = self.lake.require(task, "eval_report").digest
        version, service = self.lake.head(task, "model_version"), self.lake.head(task, "bento_service")
        if all(made is not None and made.made_from["eval_report"] == report for made in (version, service)):
            return
        result = self._execute("train_and_release", task, ("model_version", "bento_service"), {}, None)
        if not result.succeeded:
            raise GateRefusal(
                f"the candidate could not be registered and built: {result.failure or result.refusals}",
                where=f"approval for {task}",
                mend="Mend that and approve again.",
            )

    def roll_back(self, task: str, *, to: str | None = None, because: str) -> dict[str, Any]:
        """Make an earlier release's adapter live again.

        Raises:
            GateRefusal: There is none.
        """
        name = self.tasks.get(task).name
        release = promotion.roll_back(
            self.lake, self.ledger, name, to=to, actor=self.environment.actor, because=because
        )
        self.registry.set_alias(name, "champion", release["model_version"])
        return release


def _before_it_began(submission: Submission) -> "State":
    from ft_assets.watching import State

    of: dict[str, Any] = {"run_id": submission.run_id, "task": submission.task}
    name, by = f"{submission.task} {submission.run_id[:8]}", submission.canceled_by
    if submission.alive:
        return State(name, "CANCELING" if by else "SUBMITTED", None, **of)
    if by:
        return State(name, "CANCELED", False, failure=f"canceled by {by} before it began", **of)
    return State(name, "FAILURE", False, failure=f"it ended before it began: {submission.last_words()}", **of)


def outcome(run_id: str, succeeded: bool, lines: "Sequence[Line]") -> Outcome:
    """How a run that was followed ended."""
    refusals = tuple(f"{line.subject}: {line.text}" for line in lines if line.kind == "refused")
    failure = next((line.text for line in lines if line.kind == "failed"), "")
    return Outcome(run_id, succeeded and not refusals, refusals, failure)


def _check_assets(only: Sequence[str]) -> None:
    """Raises:
    SpecError: One of these names is no asset of the job that ends with a release.
    """
    known = _release_assets() if only else []
    unknown = [asset for asset in only if asset not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.4)
        raise SpecError(
            f"there is no asset '{unknown[0]}' on the way to a release",
            where="only",
            mend=(f"Did you mean '{near[0]}'? " if near else "") + f"There are: {', '.join(known)}.",
        )


def _release_assets() -> list[str]:
    """Names of the assets of the job that ends with a release."""
    from ft_assets.automation import train_and_release
    from ft_assets.definitions import defs

    return sorted(key.to_user_string() for key in train_and_release.selection.resolve(defs.resolve_asset_graph()))


def _with_absolute_urls(task: Task) -> str:
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt", pure=True)
    yaml.width = 1_000_000  # keep every line where it is: errors and origins name lines
    root = task.file.root
    for source, spec in zip(root["sources"], task.spec.sources, strict=True):
        if isinstance(spec, FilesSource) and "://" not in spec.url and not Path(spec.url).is_absolute():
            source["url"] = str(task.path.parent.resolve() / spec.url)
    text = io.StringIO()
    yaml.dump(root, text)
    return text.getvalue()
