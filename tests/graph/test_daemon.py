"""A real dagster-daemon: traffic is monitored, drift asks for training, the new adapter goes live."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import dagster as dg
import pandas as pd

from ft_assets.platform import Platform
from tests.graph.small_task import TASK

PATIENCE_SECONDS = 800


def wait_for_run(platform: Platform, job: str, wanted: dict[str, str]) -> dg.DagsterRun:
    """The newest run of `job` with these tags, once it ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        runs = platform.instance.get_runs(dg.RunsFilter(job_name=job, tags=wanted), limit=1)
        if runs and runs[0].is_finished:
            return runs[0]
        time.sleep(0.5)
    raise AssertionError((platform.environment.home / "daemon.log").read_text()[-3000:])


def test_drift_is_found_and_answered_by_the_daemon_alone(copied: Callable[[], Platform], mails: pd.DataFrame) -> None:
    platform = copied()
    first = platform.live(TASK)
    assert first is not None
    day = datetime(2002, 9, 3, 12, tzinfo=UTC)
    # later mail, almost all of it wanted: another mix of labels than the champion was evaluated on
    later = mails[(mails["event_time"] >= "2002-09-01") & (mails["label"] == "ham")].head(110)
    for number, row in enumerate(later.itertuples()):
        answer = platform.predict(TASK, [row.text], event_time=day + timedelta(seconds=number))[0]
        platform.ledger.add_feedback(prediction_id=answer.prediction_id, label=row.label, rating=None, author="tester")
    with platform.daemon():
        monitored = wait_for_run(platform, "monitor_day", {})
        assert monitored.status == dg.DagsterRunStatus.SUCCESS
        assert monitored.tags["dagster/partition"] == "2002-09-03|small-mail"
        retrained = wait_for_run(platform, "train_and_release", {"ft/trigger": "drift"})
    assert "drift on 2002-09-03" in retrained.tags["ft/because"]
    assert retrained.status == dg.DagsterRunStatus.SUCCESS
    second = platform.live(TASK)
    assert second is not None
    assert second["adapter"] != first["adapter"]
    assert second["model_version"] == "2"
    assert second["because"] == retrained.tags["ft/because"]
    assert platform.report(TASK).champion == first["adapter"]
    learned = platform.trace(platform.predict(TASK, ["hello there"])[0].prediction_id).rows
    assert (learned["origin"] == "feedback").sum() > 40
    back = platform.roll_back(TASK, because="a test of the way back")
    assert back["adapter"] == first["adapter"]
    assert platform.predict(TASK, ["hello there"])[0].adapter == first["adapter"]
    again = platform.materialise(TASK, only=["release"])
    assert "rolled back by tester: a test of the way back" in again.failure
    assert platform.live(TASK) == platform.history(TASK)[-1]
    approved = platform.approve(TASK, because="it was the better one after all")
    assert approved["adapter"] == second["adapter"]
