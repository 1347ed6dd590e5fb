"""Sensors: keep partitions in step with task files, monitor each day's traffic, ask for retraining."""

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import dagster as dg

from ft_assets.monitoring.assets import read_drift
from ft_assets.partitions import monitoring_key, task_partitions
from ft_assets.tasks import Task, TaskFolders
from ft_resources.environments import Environment
from ft_resources.errors import ArtefactError
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger

REFRESH = timedelta(hours=1)
"""A day is looked at again no sooner than this after labels arrived for it."""
DAYS_PER_TICK = 3

train_and_release = dg.define_asset_job(
    "train_and_release",
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
    description="Adds a partition for every valid task file, and removes those whose file is gone.",
)
def task_files(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    tasks, errors = TaskFolders(Environment.read().task_folders).load()
    for error in errors:
        context.log.warning(str(error))
    known = set(context.instance.get_dynamic_partitions("task"))
    added, removed = sorted(tasks.keys() - known), sorted(known - tasks.keys())
    if errors:
        removed = []  # a file that is being edited must not take its history away
    if not added and not removed:
        return dg.SkipReason(f"{len(tasks)} tasks, nothing to add; {len(errors)} files with errors")
    requests = [task_partitions.build_add_request(added)] if added else []
    return dg.SensorResult(
        dynamic_partitions_requests=[*requests, *([task_partitions.build_delete_request(removed)] if removed else [])]
    )


@dg.sensor(
    job=monitor_day,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Asks for monitoring of every day whose traffic, or whose labels, grew since it was last looked at.",
)
def traffic(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
    environment = Environment.read()
    lake, ledger = Lake(environment.lake), Ledger(environment.ledger)
    asked, now = 0, datetime.now(UTC)
    for task in _tasks(context):
        for day, size in sorted(ledger.traffic_days(task.name).items()):
            if asked == DAYS_PER_TICK or not _stale(lake, task.name, day, size, now):
                continue
            asked += 1
            yield dg.RunRequest(
                run_key=f"{task.name}|{day}|{size}",
                partition_key=monitoring_key(task.name, day),
                tags={"ft/because": f"{size} requests and labels of {day}"},
            )
    ledger.close()
    if not asked:
        yield dg.SkipReason("every day with traffic is monitored")


@dg.sensor(
    job=train_and_release,
    minimum_interval_seconds=15,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Asks for a training run when the live release drifted or lost accuracy, and enough labels came back.",
)
def retraining(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
    environment = Environment.read()
    lake, ledger = Lake(environment.lake), Ledger(environment.ledger)
    for task in _tasks(context):
        answer = wanted_retraining(task, lake, ledger)
        if isinstance(answer, str):
            yield dg.SkipReason(answer)
        elif not _under_way(context.instance, task.name):
            yield answer
    ledger.close()


def wanted_retraining(task: Task, lake: Lake, ledger: Ledger) -> dg.RunRequest | str:
    """The run that monitoring of `task` calls for, or the reason why none is called for.

    A run is asked for once per live release and set of labels: the request's key names both, so a candidate that was
    refused is not trained again on the same rows.
    """
    policy = task.spec.monitoring.retrain
    live = ledger.live_release(task.name)
    days = lake.heads(task.name, "drift_report")
    if not policy.enabled or live is None or not days:
        return f"{task.name}: nothing is live, nothing was monitored, or retraining is switched off"
    try:
        report = read_drift(lake, task.name, days[-1])
    except ArtefactError as error:
        return f"{task.name}: {error}"
    if not report["alarm"]:
        return f"{task.name}: no alarm on {days[-1]}"
    if report["release"] != live["id"] and report["adapter"] != live["adapter"]:
        return f"{task.name}: the alarm of {days[-1]} is about an earlier release"
    snapshot = lake.head(task.name, "raw_dataset")
    trained_on = 0 if snapshot is None else int((snapshot.parquet("rows.parquet")["origin"] == "feedback").sum())
    labels = len(ledger.feedback_rows(task.name))
    new = labels - trained_on
    if new < policy.min_new_labels:
        return f"{task.name}: drift since the release, waiting for labels ({new} of {policy.min_new_labels})"
    last = _last_trained_day(lake, task.name)
    if last is not None and (date.fromisoformat(days[-1]) - last).days < policy.cooldown_days:
        return f"{task.name}: trained on labels up to {last}, cooling down for {policy.cooldown_days} days"
    reasons = [*report["drift"]["reasons"], *([report["accuracy"]["reason"]] if report["accuracy"]["alarm"] else [])]
    because = f"drift on {days[-1]}: {'; '.join(reasons)}; {new} new labels"
    return dg.RunRequest(
        run_key=f"retrain|{task.name}|{live['id']}|{labels}",
        partition_key=task.name,
        tags={"ft/trigger": "drift", "ft/because": because[:1000], "dagster/priority": "1"},
    )


def _last_trained_day(lake: Lake, task: str) -> date | None:
    snapshot = lake.head(task, "raw_dataset")
    if snapshot is None:
        return None
    rows = snapshot.parquet("rows.parquet")
    times = rows.loc[rows["origin"] == "feedback", "event_time"].dropna()
    return times.max().date() if len(times) else None


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
    active: Any = [
        dg.DagsterRunStatus.QUEUED,
        dg.DagsterRunStatus.NOT_STARTED,
        dg.DagsterRunStatus.STARTING,
        dg.DagsterRunStatus.STARTED,
    ]
    tags = {"dagster/partition": task}
    return bool(instance.get_runs_count(dg.RunsFilter(statuses=active, job_name="train_and_release", tags=tags)))
