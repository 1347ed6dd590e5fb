"""Runs of the asset graph: executed here, or submitted to processes of their own and followed from anywhere."""

import difflib
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_assets.evaluation.servable import PLUGGED, unserved
from ft_assets.home import Home
from ft_assets.submitting import CannotCancel, Submission, Submissions
from ft_assets.tasks import Task
from ft_assets.training import recipes
from ft_assets.training.failures import failed_results
from ft_assets.training.jobs import ACTOR
from ft_resources.errors import FtError, SpecError

if TYPE_CHECKING:
    from ft_assets.following import Line
    from ft_assets.watching import State, Watched

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
    """Why the run was to end with what was trained or with its evaluation; empty where it was to end with a release."""


class Runs:
    """The runs of one platform home."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._submissions = Submissions(home.environment)

    def materialise(
        self,
        task: str,
        *,
        only: Sequence[str],
        because: str,
        show: "Callable[[Line], None] | None",
        run_id: str | None,
    ) -> Outcome:
        """See `Platform.materialise`."""
        found = self._home.tasks.get(task)
        name = found.name
        why = ""
        if not only:
            why, only = _unserved(found)
        _check_assets(only)
        self._home.instance.add_dynamic_partitions("task", [name])
        return replace(
            self.execute("train_and_release", name, only, {"ft/because": because}, show, run_id), unserved=why
        )

    def submit(self, task: str, *, only: Sequence[str], because: str, actor: str | None) -> str:
        """See `Platform.submit`."""
        name, actor = self._home.tasks.get(task).name, actor or self._home.environment.actor
        _check_assets(only)
        with self._submissions.turn():
            for one in self._submissions.all():
                if one.task == name and one.is_here and one.alive and not self._is_finished(one):
                    raise self._busy(name, one.run_id)
            self._require_idle(name)
            run_id = self._submissions.start(name, only, because, actor).run_id
        self._home.ledger.audit(actor, "submit", name, run_id, {"only": list(only), "because": because})
        return run_id

    def cancel(self, run: str, *, actor: str | None) -> "State":
        """See `Platform.cancel`."""
        from ft_assets import preemption

        state, submission, actor = self.status(run), self._submissions.find(run), actor or self._home.environment.actor
        instance, begun = self._home.instance, self._home.instance.get_run_by_id(state.run_id)
        waits = begun is not None and begun.tags.get(preemption.STATE) == preemption.STOPPING
        over, queued = state.succeeded is not None, begun is not None and begun.remote_job_origin is not None
        if (over and not waits) or (not over and submission is None and not queued):
            raise CannotCancel(
                f"run {state.run_id} is over" if over else f"run {state.run_id} was neither submitted nor queued",
                where=f"task {state.task}",
                mend="There is nothing to cancel." if over else "End it where it was started.",
            )
        if begun is not None and waits:  # nothing goes on from it
            instance.add_run_tags(begun.run_id, {preemption.STATE: preemption.ENDED})
        if not over and begun is not None:
            self._submissions.end(instance, begun, actor)
        elif not over and submission is not None:
            submission.cancel(actor)
        self._home.ledger.audit(actor, "cancel", state.task, state.run_id, {})
        return self.status(state.run_id)

    def status(self, run: str) -> "State":
        """See `Platform.status`."""
        submission = self._submissions.find(run)
        if submission is None:
            return self.watched(run).read()
        if not submission.alive:
            self._bury(submission)
        begun = self._home.instance.has_run(submission.run_id)
        return self.watched(run).read() if begun else _before_it_began(submission)

    def recent(self, most: int, tasks: Collection[str] | None) -> "list[State]":
        """See `Platform.recent`."""
        import dagster as dg

        from ft_assets.watching import State

        wanted = dg.RunsFilter(tags={"dagster/partition": sorted(tasks)}) if tasks is not None else None
        records = self._home.instance.get_run_records(wanted, limit=most) if tasks is None or tasks else []
        found = [(record.create_timestamp, State.of(record.dagster_run)) for record in records]
        submitted = (one for one in self._submissions.all() if tasks is None or one.task in tasks)
        found += [
            (datetime.fromisoformat(one.submitted), _before_it_began(one))
            for one in islice(submitted, most)
            if not self._home.instance.has_run(one.run_id)
        ]
        return [state for _, state in sorted(found, key=lambda one: one[0], reverse=True)[:most]]

    def monitor(self, task: str, day: str, *, show: "Callable[[Line], None] | None") -> Outcome:
        """See `Platform.monitor`."""
        from ft_assets.partitions import FIRST_DAY, monitoring_key

        name = self._home.tasks.get(task).name
        try:
            known = FIRST_DAY <= date.fromisoformat(day).isoformat() <= datetime.now(UTC).date().isoformat()
        except ValueError:
            known = False
        if not known:
            raise SpecError(
                f"'{day}' is not a day with traffic", where="day", mend=f"Give an ISO day from {FIRST_DAY} to today."
            )
        return self.execute("monitor_day", monitoring_key(name, day), (), {}, show)

    def watched(self, run: str) -> "Watched":
        """See `Platform.watched`."""
        from ft_assets.watching import UnknownRun, Watched

        submission = self._submissions.find(run)
        while submission is not None and not self._home.instance.has_run(submission.run_id):
            if not submission.alive:
                raise UnknownRun(
                    f"run {submission.run_id} ended before it began: {submission.last_words()}",
                    where=str(submission.log),
                    mend="Mend that and submit again.",
                )
            time.sleep(0.2)
        return Watched(self._home.environment.mlflow, self._home.instance, run)

    def execute(
        self,
        job: str,
        key: str,
        only: Sequence[str],
        tags: dict[str, str],
        show: "Callable[[Line], None] | None",
        run_id: str | None = None,
    ) -> Outcome:
        """Run a job for one partition in this process.

        Args:
            only: Names of its assets; empty for all.
            show: Called with every line of progress.

        Raises:
            PlatformBusy: Another run works on the partition.
        """
        import dagster as dg

        from ft_assets.definitions import defs
        from ft_assets.following import Line, following

        self._require_idle(str(key))
        run_id, seen = run_id or str(uuid.uuid4()), list[Line]()
        home = self._home

        def watch(line: Line) -> None:
            seen.append(line)
            if show is not None:
                show(line)

        with following(home.instance, run_id, watch):
            result = defs.resolve_job_def(job).execute_in_process(
                run_id=run_id,
                partition_key=key,
                instance=home.instance,
                tags={ACTOR: home.environment.actor, **tags},
                asset_selection=[dg.AssetKey(name) for name in only] or None,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                raise_on_error=False,
            )
        ended = outcome(run_id, result.success, seen)
        return ended if ended.succeeded else replace(ended, results=failed_results(home.environment, str(key), run_id))

    def _is_finished(self, submission: Submission) -> bool:
        """Whether its run is over, whose process may take a moment longer."""
        run = self._home.instance.get_run_by_id(submission.run_id)
        return run is not None and run.is_finished

    def _bury(self, submission: Submission) -> None:
        """Close the run of a process that ended without doing so: it would keep its task busy for ever."""
        run = self._home.instance.get_run_by_id(submission.run_id)
        if run is None or run.is_finished:
            return
        if submission.canceled_by:
            self._home.instance.report_run_canceled(run, f"Canceled by {submission.canceled_by}.")
        else:
            self._home.instance.report_run_failed(run, f"its process ended: {submission.last_words()}")

    def _require_idle(self, key: str) -> None:
        import dagster as dg

        from ft_assets.automation import ACTIVE

        working = dg.RunsFilter(statuses=ACTIVE, tags={"dagster/partition": key})
        others = self._home.instance.get_runs(working, limit=1)
        if others:
            raise self._busy(key, others[0].run_id)

    def _busy(self, key: str, run_id: str) -> PlatformBusy:
        return PlatformBusy(
            f"run {run_id} of '{key}' is under way",
            where=f"task {key}",
            mend=f"Wait for it, or end it: ft cancel {run_id[:8]} if it was submitted, else in the UI.",
        )


def outcome(run_id: str, succeeded: bool, lines: "Sequence[Line]") -> Outcome:
    """How a run that was followed ended."""
    refusals = tuple(f"{line.subject}: {line.text}" for line in lines if line.kind == "refused")
    failure = next((line.text for line in lines if line.kind == "failed"), "")
    return Outcome(run_id, succeeded and not refusals, refusals, failure)


def _unserved(task: Task) -> tuple[str, Sequence[str]]:
    """Why the run of a task ends before a release, and the assets it makes until then; empty where it does not."""
    merged = recipes.resolve(task)
    if isinstance(merged, recipes.Plugged):
        return PLUGGED, (*TRAINING_ASSETS, "eval_report")
    settings = recipes.of_transformers(merged).settings
    why = unserved(settings.method, dora=settings.lora.use_dora)
    return why, TRAINING_ASSETS if why else ()


def _before_it_began(submission: Submission) -> "State":
    from ft_assets.watching import State

    of: dict[str, Any] = {"run_id": submission.run_id, "task": submission.task}
    name, by = f"{submission.task} {submission.run_id[:8]}", submission.canceled_by
    if submission.alive:
        return State(name, "CANCELING" if by else "SUBMITTED", None, **of)
    if by:
        return State(name, "CANCELED", False, failure=f"canceled by {by} before it began", **of)
    return State(name, "FAILURE", False, failure=f"it ended before it began: {submission.last_words()}", **of)


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
