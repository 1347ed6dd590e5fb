"""Sensors, called as the daemon calls them: one tick over several tasks."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from ft_assets import automation
from ft_assets.platform import Platform
from tests.graph.small_task import TASK, TASK_FILE, write_task

DAY = datetime(2002, 9, 3, 12, tzinfo=UTC)


@pytest.fixture
def platform(copied: Callable[[], Platform], tmp_path: Path) -> Platform:
    """The built task, and beside it one that was never run."""
    platform = copied()
    path = write_task(tmp_path / "other", TASK_FILE.replace("name: small-mail", "name: other-mail"))
    (platform.environment.home / "tasks" / "other-mail.yaml").write_text(path.read_text())
    platform.environment.export()
    return platform


def tick(sensor: dg.SensorDefinition, platform: Platform) -> object:
    return sensor(dg.build_sensor_context(instance=platform.instance))


def answered(platform: Platform, day: datetime, count: int, label: str | None = "ham") -> None:
    """`count` answers on a day, with their labels."""
    for number in range(count):
        text = f"meeting number {number} about the kernel list and patch {number * 31}"
        one = platform.predict(TASK, [text], event_time=day + timedelta(seconds=number))[0]
        if label:
            platform.ledger.add_feedback(prediction_id=one.prediction_id, label=label, rating=None, author="tester")


def test_a_new_task_file_becomes_a_partition(platform: Platform) -> None:
    result = tick(automation.task_files, platform)
    assert isinstance(result, dg.SensorResult)
    (request,) = result.dynamic_partitions_requests or ()
    assert request.partition_keys == ["other-mail"]


def test_a_file_with_an_error_keeps_the_others_and_its_partition(platform: Platform) -> None:
    (platform.environment.home / "tasks" / "small-mail.yaml").write_text("name: [")
    tick(automation.task_files, platform)
    assert platform.instance.get_dynamic_partitions("task") == [TASK]


def test_quiet_tasks_make_one_reason_to_skip(platform: Platform) -> None:
    platform.instance.add_dynamic_partitions("task", ["other-mail"])
    reason = tick(automation.retraining, platform)
    assert isinstance(reason, dg.SkipReason)
    assert TASK in str(reason.skip_message)
    assert "other-mail" in str(reason.skip_message)


def test_each_past_day_is_asked_for_once_until_it_grows(platform: Platform) -> None:
    answered(platform, DAY, 3)
    answered(platform, datetime(1999, 1, 1, tzinfo=UTC), 1)  # no partition of the graph: left alone
    requests = tick(automation.traffic, platform)
    assert isinstance(requests, list)
    (request,) = requests
    assert str(request.partition_key) == f"2002-09-03|{TASK}"
    assert platform.monitor(TASK, "2002-09-03").succeeded
    assert isinstance(tick(automation.traffic, platform), dg.SkipReason)


def test_drift_waits_for_labels_and_then_asks_once(platform: Platform) -> None:
    answered(platform, DAY, 60, label=None)
    assert platform.monitor(TASK, "2002-09-03").succeeded
    reason = tick(automation.retraining, platform)
    assert isinstance(reason, dg.SkipReason)
    assert "waiting for labels (0 of 40)" in str(reason.skip_message)
    answered(platform, DAY + timedelta(hours=1), 45)
    assert platform.monitor(TASK, "2002-09-03").succeeded
    (first,) = tick(automation.retraining, platform)
    (second,) = tick(automation.retraining, platform)
    assert first.run_key == second.run_key
    assert "45 new labels" in first.tags["ft/because"]


def test_a_damaged_artefact_of_one_task_is_logged_and_skipped(platform: Platform) -> None:
    answered(platform, DAY, 60)
    assert platform.monitor(TASK, "2002-09-03").succeeded
    platform.lake.require(TASK, "drift_report/2002-09-03").path("drift.json").write_text("{}")
    assert isinstance(tick(automation.retraining, platform), dg.SkipReason)
