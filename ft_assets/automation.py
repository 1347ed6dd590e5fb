"""Sensors: keep partitions in step with task files, monitor each day's traffic, ask for retraining."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any

import dagster as dg
import pandas as pd

from ft_assets import preemption
from ft_assets.monitoring.assets import read_drift
from ft_assets.partitions import FIRST_DAY, monitoring_key, task_partitions
from ft_assets.submitting import Submissions
from ft_assets.tasks import FeedbackSource, Task, TaskFolders
from ft_resources.environments import Environment
from ft_resources.errors import FtError
from ft_resources.lake import Artefact, Lake
from ft_resources.ledger import Ledger

ACTIVE = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, *preemption.AT_WORK]
"""States of a run that is not over; one that is being canceled may still save its state."""
REFRESH = timedelta(hours=1)
"""A day is looked at again no sooner than this after labels arrived for it."""
DAYS_PER_TICK = 3
ATTEMPTS = 3
"""A day whose monitoring keeps failing is left alone after this many tries, until it grows."""

train_and_release = dg.define_asset_job(
    preemption.TRAINING_JOB,
    selection=dg.AssetSelection.groups("1_data", "2_training", "3_evaluation", "4_release"),
    description="One task from its raw rows to a live release; a failed blocking check stops it.",
)
monitor_day = dg.define_asset_job(
    "monitor_day",
    selection=dg.AssetSelection.groups("5_monitoring"),
    description="One day of one task's traffic: compact it, look for drift, queue rows for labels.",
)


@dg.sensor(
    minimum_interval_seconds=15,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Adds a partition for every valid task file. It stays when the file goes, as its history does.",
)
def task_files(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    tasks, errors = TaskFolders(Environment.read().task_folders).load()
    for error in errors:
        context.log.warning(str(error))
    added = sorted(tasks.keys() - set(context.instance.get_dynamic_partitions("task")))
    if not added:
        return dg.SkipReason(f"{len(tasks)} tasks, nothing to add; {len(errors)} files with errors")
    return dg.SensorResult(dynamic_partitions_requests=[task_partitions.build_add_request(added)])


@dg.sensor(
    job=monitor_day,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Asks for monitoring of every day whose traffic, or whose labels, grew since it was last looked at.",
)
def traffic(context: dg.SensorEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
    now = datetime.now(UTC)
    requests: list[dg.RunRequest] = []
    with _stores() as (lake, ledger):
        for task in _tasks(context):
            for day, size in sorted(ledger.traffic_days(task.name).items()):
                if len(requests) == DAYS_PER_TICK or day < FIRST_DAY:
                    continue
                with _noted(context, task.name):
                    key = f"{task.name}|{day}|{size}"
                    attempt = _attempt(context.instance, key) if _stale(lake, task.name, day, size, now) else None
                    if attempt is not None:
                        requests.append(_monitoring(task.name, day, size, key, attempt))
    return requests or dg.SkipReason("every day with traffic is monitored, or under way")


@dg.sensor(
    job=train_and_release,
    minimum_interval_seconds=15,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Asks for a training run when the live release drifted or lost accuracy, and enough labels came back.",
)
def retraining(context: dg.SensorEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
    requests: list[dg.RunRequest] = []
    reasons: list[str] = []
    with _stores() as (lake, ledger):
        for task in _tasks(context):
            with _noted(context, task.name):
                answer = wanted_retraining(task, lake, ledger)
                if isinstance(answer, str):
                    reasons.append(answer)
                elif _under_way(context.instance, task.name):
                    reasons.append(f"{task.name}: a run is under way")
                else:
                    requests.append(answer)
    return requests or dg.SkipReason("; ".join(reasons) or "there are no tasks")


@dg.sensor(
    job=train_and_release,
    minimum_interval_seconds=10,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Sorts the queue by the priority of tasks. Where no place is free, a training of less priority is "
    "stopped for one that waits, and asked for again: it goes on from what it saved.",
)
def priorities(context: dg.SensorEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
    environment, instance = Environment.read(), context.instance
    queue, requests = instance.get_concurrency_config().run_queue_config, preemption.resumptions(instance)
    queued = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED]), ascending=True)
    if queue is None or not queued:
        return requests or dg.SkipReason("no run waits")
    tasks, _ = TaskFolders(environment.task_folders).load()
    waiting = preemption.sort_queue(instance, queued, tasks)
    submissions = Submissions(environment)
    working = preemption.at_work(instance, tasks, Lake(environment.lake), submissions)
    choice = preemption.choose(waiting, working, queue.max_concurrent_runs)
    if isinstance(choice, str):
        return requests or dg.SkipReason(choice)
    done = preemption.stop(instance, submissions, choice)
    context.log.info(done)
    return requests or dg.SkipReason(done)


def wanted_retraining(task: Task, lake: Lake, ledger: Ledger) -> dg.RunRequest | str:
    """The run that monitoring of `task` calls for, or the reason why none is called for.

    A run is asked for once per live release and set of labels: the request's key names both, so a candidate that was
    refused is not trained again on the same rows.
    """
    name, policy = task.name, task.spec.monitoring.retrain
    live = ledger.live_release(name)
    if not policy.enabled or live is None:
        return f"{name}: nothing is live, or retraining is switched off"
    if not any(isinstance(source, FeedbackSource) for source in task.spec.sources):
        return f"{name}: no source of kind feedback, so there is nothing new to learn from"
    report = _last_verdict(lake, name, live["adapter"])
    if report is None:
        return f"{name}: the traffic of the live release has no verdict yet"
    if not report["alarm"]:
        return f"{name}: no alarm on {report['day']}"
    known = _rows_behind(lake, lake.require(name, "adapter"))
    fed_back = known.loc[known["origin"] == "feedback"]
    labels = len(ledger.feedback_rows(name))
    new = labels - len(fed_back)
    if new < policy.min_new_labels:
        return f"{name}: drift on {report['day']}, waiting for labels ({new} of {policy.min_new_labels})"
    if (
        len(fed_back)
        and (date.fromisoformat(report["day"]) - fed_back["event_time"].max().date()).days < policy.cooldown_days
    ):
        return f"{name}: drift on {report['day']}, cooling down for {policy.cooldown_days} days of traffic"
    alarms = [*report["drift"]["reasons"], *([report["accuracy"]["reason"]] if report["accuracy"]["alarm"] else [])]
    rank = preemption.RANKS[task.spec.priority]
    because = f"drift on {report['day']}: {' '.join(alarms)} {new} new labels"
    return dg.RunRequest(
        run_key=f"retrain|{name}|{live['id']}|{labels}",
        partition_key=name,
        tags={"ft/trigger": "drift", "ft/because": because[:1000], preemption.RANK: str(rank + 1)},
    )


def _last_verdict(lake: Lake, task: str, adapter: str) -> dict[str, Any] | None:
    """The newest drift report about `adapter` that had enough rows to say something."""
    for day in reversed(lake.heads(task, "drift_report")):
        report = read_drift(lake, task, day)
        if report["adapter"] == adapter and (report["drift"]["tests"] or report["accuracy"]["alarm"]):
            return report
    return None


def _rows_behind(lake: Lake, adapter: Artefact) -> pd.DataFrame:
    """The raw snapshot that an adapter was trained on."""
    clean = lake.open(lake.open(adapter.made_from["train_split"]).made_from["clean_dataset"])
    return lake.open(clean.made_from["raw_dataset"]).parquet("rows.parquet")


def _monitoring(task: str, day: str, size: int, key: str, attempt: int) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=f"{key}|{attempt}",
        partition_key=monitoring_key(task, day),
        tags={"ft/because": f"{size} requests and labels of {day}", "ft/traffic": key},
    )


def _attempt(instance: dg.DagsterInstance, key: str) -> int | None:
    """Which try the next run for this state of a day is; None while one is under way or after the last try failed."""
    runs = instance.get_runs(dg.RunsFilter(tags={"ft/traffic": key}))
    unfinished = any(run.status not in (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED) for run in runs)
    return None if unfinished or len(runs) >= ATTEMPTS else len(runs) + 1


@contextmanager
def _stores() -> Iterator[tuple[Lake, Ledger]]:
    environment = Environment.read()
    ledger = Ledger(environment.ledger)
    try:
        yield Lake(environment.lake), ledger
    finally:
        ledger.close()


@contextmanager
def _noted(context: dg.SensorEvaluationContext, task: str) -> Iterator[None]:
    """One task's damaged artefact is logged and does not keep the sensor from the others."""
    try:
        yield
    except FtError as error:
        context.log.error(f"{task}: {error}")


def _tasks(context: dg.SensorEvaluationContext) -> list[Task]:
    tasks, _ = TaskFolders(Environment.read().task_folders).load()
    known = set(context.instance.get_dynamic_partitions("task"))
    return [task for name, task in sorted(tasks.items()) if name in known]


def _stale(lake: Lake, task: str, day: str, size: int, now: datetime) -> bool:
    """Whether a past day has requests or labels that its report did not see, and was not looked at within the hour."""
    if day >= now.date().isoformat():
        return False  # the day is not over
    looked_at = lake.head_time(task, f"drift_report/{day}")
    if looked_at is None:
        return True
    seen = lake.require(task, f"served_traffic/{day}").made_from["requests_and_labels"]
    return bool(size != seen) and now - looked_at > REFRESH


def _under_way(instance: dg.DagsterInstance, task: str) -> bool:
    tags = {"dagster/partition": task}
    return bool(instance.get_runs_count(dg.RunsFilter(statuses=ACTIVE, job_name="train_and_release", tags=tags)))
