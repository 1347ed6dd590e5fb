"""Preemption: a training that matters more takes the place of one that matters less, which goes on later.

`choose` is the policy, pure. The rest is what the sensor `priorities` does with it: the run that is stopped saves its
state, is marked with who took its place and why, and is asked for again with what it had not made yet.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from ft_assets.submitting import CannotCancel, Submissions
from ft_assets.tasks import Priority, Task
from ft_assets.training.jobs import CHECKPOINT
from ft_resources.lake import Lake

RANKS: Mapping[Priority, int] = {"production": 10, "standard": 0, "research": -10}
"""A task's priority -> tag `dagster/priority` of its runs, by which the queue is sorted."""
CLASS = 10
"""Ranks of one priority; of those within it the queue alone takes care, such as a retraining's."""
LONGEST_UNSAVED = 15 * 60.0
"""Seconds: a training that would lose more than this is left to end."""
MOST_STOPS = 3
"""A run that was stopped so often is left to end."""
TRAINING = ("search_results", "adapter")
"""Assets in whose making a run may be stopped: never in evaluation or release."""

TRAINING_JOB = "train_and_release"
PARTITION, RANK = "dagster/partition", "dagster/priority"
STATE = "ft/preempted"
"""Tag of a run that was stopped for another one: `STOPPING`, then `resumed`, or `ENDED`: nothing goes on from it."""
STOPPING, ENDED = "stopping", "ended"
BY, BECAUSE, RESUMED_AS = "ft/preempted_by", "ft/preempted_because", "ft/resumed_as"
RESUMES, STOPS = "ft/resumes", "ft/preemptions"
"""Tags of the run that goes on: which run it goes on from, and how often it was stopped altogether."""

AT_WORK = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
"""States in which a run holds a place."""


@dataclass(frozen=True)
class Waiting:
    """A run in the queue."""

    run_id: str
    key: str
    """Its partition, of which one run works at a time; of a training, the task."""
    rank: int
    trains: bool = True


@dataclass(frozen=True)
class Working:
    """A run that holds a place."""

    run_id: str
    key: str
    rank: int
    assets: tuple[str, ...] = ()
    """What it makes at the moment."""
    unsaved_seconds: float = 0.0
    """Work that would have to be done again if it were stopped now."""
    stops: int = 0
    stoppable: bool = True
    """Whether it can be asked to end: it was started by the queue or by `ft run --detach` here."""
    stopping: bool = False


@dataclass(frozen=True)
class Choice:
    """Whom to stop, and for whom."""

    victim: Working
    by: Waiting


def choose(waiting: Sequence[Waiting], working: Sequence[Working], places: int) -> Choice | str:
    """The run to stop now, or why none is.

    It gives way to the first run of the queue that no place is, or becomes, free for. Of those of less priority that
    train at the moment, the one of least priority goes, and of several the one that loses least work.

    Args:
        waiting: In the order of the queue where ranks are equal.
        places: How many runs may work at once; below 0: any number.
    """
    free = places - sum(not one.stopping for one in working)
    busy, turns = {one.key for one in working if not one.stopping}, list[Waiting]()
    for one in sorted(waiting, key=lambda one: -one.rank):
        if one.key not in busy:
            busy.add(one.key)
            turns.append(one)
    late = [one for one in turns[max(0, free) :] if one.trains]
    if places < 0 or not late:
        return "no training waits for a place"
    first = late[0]
    lower = [one for one in working if first.rank // CLASS > one.rank // CLASS and not one.stopping]
    candidates = [one for one in lower if not _kept(one)]
    if candidates:
        return Choice(min(candidates, key=lambda one: (one.rank, one.unsaved_seconds)), first)
    if lower:
        return f"{first.key} waits: {'; '.join(f'{one.key} {_kept(one)}' for one in lower)}"
    return f"{first.key} waits: nothing of less priority is at work"


def _kept(run: Working) -> str:
    """Why a run of less priority is not stopped; empty where it can be."""
    if run.rank >= RANKS["production"]:
        return "is production"
    if not run.stoppable:
        return "was not started by the queue"
    if not run.assets or not set(run.assets) <= set(TRAINING):
        return f"is at {', '.join(run.assets) or 'its start'}"
    if run.stops >= MOST_STOPS:
        return f"was stopped {run.stops} times already"
    if run.unsaved_seconds > LONGEST_UNSAVED:
        return f"would lose {run.unsaved_seconds / 60:.0f} minutes"
    return ""


# -- what there is ------------------------------------------------------------------------------------------------


def rank_of(run: dg.DagsterRun, tasks: Mapping[str, Task]) -> int:
    """The rank that a run has by its tag, else by its task."""
    told = run.tags.get(RANK, "")
    if told.removeprefix("-").isdigit():
        return int(told)
    task = tasks.get(run.tags.get(PARTITION, ""))
    return RANKS[task.spec.priority] if task is not None else 0


def sort_queue(
    instance: dg.DagsterInstance, queued: Sequence[dg.DagsterRun], tasks: Mapping[str, Task]
) -> list[Waiting]:
    """Give every run in the queue that trains and has no rank the one of its task, and list the queue in its order."""
    queue = []
    for run in queued:
        rank, trains = rank_of(run, tasks), run.tags.get(PARTITION) in tasks
        if trains and RANK not in run.tags:
            instance.add_run_tags(run.run_id, {RANK: str(rank)})
        queue.append(Waiting(run.run_id, run.tags.get(PARTITION, run.run_id), rank, trains))
    return queue


def at_work(
    instance: dg.DagsterInstance, tasks: Mapping[str, Task], lake: Lake, submissions: Submissions
) -> list[Working]:
    """Every run that holds a place."""
    return [_working(instance, run, rank_of(run, tasks), lake, submissions) for run in _active(instance)]


def _active(instance: dg.DagsterInstance) -> Sequence[dg.DagsterRun]:
    return instance.get_runs(dg.RunsFilter(statuses=AT_WORK))


def _working(
    instance: dg.DagsterInstance, run: dg.DagsterRun, rank: int, lake: Lake, submissions: Submissions
) -> Working:
    key = run.tags.get(PARTITION, run.run_id)
    under_way = [
        step
        for step in instance.get_run_step_stats(run.run_id)
        if step.start_time is not None and step.end_time is None
    ]
    trains = any(step.step_key in TRAINING for step in under_way)
    submission = submissions.find(run.run_id)
    began = min((step.start_time for step in under_way if step.start_time is not None), default=0.0)
    return Working(
        run.run_id,
        key,
        rank,
        tuple(step.step_key for step in under_way),
        _unsaved(lake, key, datetime.fromtimestamp(began, UTC)) if trains else 0.0,
        int(run.tags.get(STOPS, "0")),
        run.remote_job_origin is not None or (submission is not None and submission.is_here and submission.alive),
        STATE in run.tags or run.status == dg.DagsterRunStatus.CANCELING,
    )


def _unsaved(lake: Lake, task: str, began: datetime) -> float:
    """Seconds since the newest checkpoint of the training that began then, or since it began."""
    saved = (lake.head_time(task, f"{CHECKPOINT}/{name}") for name in lake.heads(task, CHECKPOINT))
    return (datetime.now(UTC) - max([began, *(time for time in saved if time is not None)])).total_seconds()


# -- what is done -------------------------------------------------------------------------------------------------


def stop(instance: dg.DagsterInstance, submissions: Submissions, choice: Choice) -> str:
    """Mark the victim, and ask it to save its state and end. Returns what was done, for people."""
    run = instance.get_run_by_id(choice.victim.run_id)
    assert run is not None  # it was at work a moment ago
    if run.is_finished:
        return f"{choice.victim.key} has ended meanwhile"
    because = (
        f"{choice.by.key} (rank {choice.by.rank}, run {choice.by.run_id[:8]}) takes the place of {choice.victim.key} "
        f"(rank {choice.victim.rank}), which saves its state and goes on later"
    )
    instance.add_run_tags(run.run_id, {STATE: STOPPING, BY: choice.by.run_id, BECAUSE: because})
    instance.report_engine_event(f"Preempted: {because}.", run)
    with suppress(CannotCancel):  # it has ended meanwhile
        submissions.end(instance, run, f"run {choice.by.run_id[:8]}")
    return because


def resumptions(instance: dg.DagsterInstance) -> list[dg.RunRequest]:
    """A request for each run that was stopped and has not been asked for again."""
    requests = []
    for run in instance.get_runs(dg.RunsFilter(tags={STATE: STOPPING})):
        if not run.is_finished:
            continue
        again = instance.get_runs(dg.RunsFilter(tags={RESUMES: run.run_id}), limit=1)
        if run.is_success or again:
            told = {STATE: "resumed", RESUMED_AS: again[0].run_id} if again else {STATE: ENDED}
            instance.add_run_tags(run.run_id, told)
        else:
            requests.append(_resumption(instance, run))
    return requests


def _resumption(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.RunRequest:
    """What goes on where `run` was stopped: the assets and checks that it was to make and had not."""
    assets, checks = _left(instance, run)
    kept = {
        name: value for name, value in run.tags.items() if name.startswith("ft/") and name not in (STATE, BY, BECAUSE)
    }
    return dg.RunRequest(
        run_key=f"resume|{run.run_id}",
        partition_key=run.tags[PARTITION],
        tags={
            **kept,
            **({RANK: run.tags[RANK]} if RANK in run.tags else {}),
            RESUMES: run.run_id,
            STOPS: str(int(run.tags.get(STOPS, "0")) + 1),
        },
        asset_selection=assets,
        asset_check_keys=checks,
    )


def _left(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[list[dg.AssetKey], list[dg.AssetCheckKey]]:
    planned, made = set[Any](), set[Any]()
    kind = dg.DagsterEventType
    for types, found in (
        ({kind.ASSET_MATERIALIZATION_PLANNED, kind.ASSET_CHECK_EVALUATION_PLANNED}, planned),
        ({kind.ASSET_MATERIALIZATION, kind.ASSET_CHECK_EVALUATION}, made),
    ):
        cursor, more = None, True
        while more:
            batch = instance.get_records_for_run(run.run_id, cursor=cursor, of_type=types)
            for record in batch.records:
                event = record.event_log_entry.dagster_event
                assert event is not None  # every event of these types is one of dagster's
                about: Any = event.event_specific_data
                found.add(event.asset_key if "MATERIALIZATION" in event.event_type_value else about.asset_check_key)
            cursor, more = batch.cursor, batch.has_more
    left = planned - made
    assets = sorted((key for key in left if isinstance(key, dg.AssetKey)), key=lambda key: key.to_user_string())
    checks = [key for key in left if isinstance(key, dg.AssetCheckKey)]
    return assets, sorted(checks, key=lambda key: (key.asset_key.to_user_string(), key.name))
