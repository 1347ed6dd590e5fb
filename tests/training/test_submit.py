"""A submitted run: its id is there at once, it goes on by itself, and leaves the record of who asked for what."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
from typer.testing import CliRunner

from ft_assets.cli import app
from ft_assets.platform import TRAINING_ASSETS, Platform, PlatformBusy
from ft_assets.submitting import CannotCancel
from ft_assets.tasks import UnknownTask
from ft_assets.training.jobs import triggered_by
from ft_assets.training.recipes import resolve
from ft_assets.watching import State, UnknownRun, line
from ft_resources.environments import Environment
from ft_resources.errors import SpecError
from ft_resources.provenance import code
from ft_resources.tracking import curve, trainings
from tests.training.small import texts

TASK = """\
name: weather
type: text-classification
labels: [cold, warm]
recipe: encoder-lora@1
overrides:
  base: {{model: {base}, max_tokens: 64}}
  lora: {{rank: 4}}
  training: {{epochs: 3, precision: fp32, learning_rate: 5.0e-3}}
sources:
  - {{kind: files, url: rows.jsonl}}
cleaning: {{min_chars: 1, near_duplicates: 1.0}}
"""


@pytest.fixture
def platform(tmp_path: Path, tiny: Callable[[str], str]) -> Iterator[Platform]:
    home = tmp_path / "home"
    opened = Platform(Environment.read({"FT_TASKS": str(home / "tasks"), "FT_ACTOR": "tester"}, home=home))
    texts(100, 1).to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    (tmp_path / "weather.yaml").write_text(TASK.format(base=tiny("bert")))
    opened.add_task(tmp_path / "weather.yaml")
    yield opened
    opened.ledger.close()
    opened.instance.dispose()


def test_a_submitted_run_returns_at_once_and_succeeds_on_its_own(platform: Platform) -> None:
    began = time.monotonic()
    run = platform.submit("weather", only=TRAINING_ASSETS, because="a test")
    returned = time.monotonic() - began
    assert platform.status(run).state == "SUBMITTED"
    assert platform.recent()[0].name == f"weather {run[:8]}"
    with pytest.raises(PlatformBusy, match=run):
        platform.submit("weather")
    *_, last = platform.watched(run[:8]).states()
    took = time.monotonic() - began
    assert last.succeeded, (platform.environment.home / "submitted" / run / "log.txt").read_text()
    assert platform.status(run).state == "SUCCESS"
    assert returned < 2
    assert returned < took / 5
    _check_trace(platform, run)


def _check_trace(platform: Platform, run: str) -> None:
    (event,) = platform.instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=dg.AssetKey("adapter")), limit=1
    ).records
    materialised = event.asset_materialization
    assert materialised is not None
    trace = materialised.metadata["trace_record"].value
    assert isinstance(trace, dict)
    template = resolve(platform.tasks.get("weather")).template_digest
    assert {name: trace[name] for name in ("job_id", "template", "template_digest", "triggered_by")} == {
        "job_id": run,
        "template": "encoder-lora@1",
        "template_digest": template,
        "triggered_by": "user tester",
    }
    assert {"commit": trace["commit"], "dirty": trace["dirty"]} == code()
    assert timedelta() < datetime.now(UTC) - datetime.fromisoformat(trace["submit_time"]) < timedelta(minutes=5)
    config = Path(trace["config"])
    assert "rank: 4" in config.read_text()
    assert json.loads((config.parent / "environment.json").read_text())["provenance"]["trace"] == trace
    (tracked,) = trainings(platform.environment.mlflow, dagster_run=run)
    assert {name: tracked.data.tags[f"trace.{name}"] for name in trace} == {k: str(v) for k, v in trace.items()}


def test_a_run_whose_process_died_has_failed_and_frees_its_task(platform: Platform) -> None:
    run = platform.submit("weather")
    told = json.loads((platform.environment.home / "submitted" / run / "request.json").read_text())
    os.kill(told["pid"], signal.SIGKILL)
    while platform.status(run).succeeded is None:
        pass
    ended = platform.status(run)
    assert (ended.state, ended.failure) == ("FAILURE", "it ended before it began: it printed nothing, as if killed")
    assert ended.failure in line(ended)
    with pytest.raises(UnknownRun, match="ended before it began"):
        platform.watched(run)
    again = platform.submit("weather")
    platform.watched(again)  # until it has begun
    told = json.loads((platform.environment.home / "submitted" / again / "request.json").read_text())
    os.kill(told["pid"], signal.SIGKILL)
    while platform.status(again).succeeded is None:
        pass
    assert platform.status(again).state == "FAILURE"
    assert {one.name for one in platform.recent()} == {f"weather {run[:8]}", f"weather {again[:8]}"}


@pytest.mark.slow
def test_a_run_that_is_canceled_while_it_trains_ends_and_the_next_goes_on_from_there(platform: Platform) -> None:
    file = platform.environment.home / "tasks" / "weather.yaml"
    file.write_text(file.read_text().replace("epochs: 3,", "epochs: 100, checkpoint_minutes: 0.001,"))

    def trained(run: str, steps: int) -> State:
        for state in platform.watched(run).states():
            if (state.step or 0) >= steps:
                return state
        raise AssertionError(state)

    first = platform.submit("weather", only=TRAINING_ASSETS)
    reached = trained(first, 20).step
    assert platform.cancel(first[:8], actor="grace").state == "CANCELING"
    *_, last = platform.watched(first).states()
    assert (last.state, last.succeeded) == ("CANCELED", False)
    (tracked,) = trainings(platform.environment.mlflow, dagster_run=first)
    assert tracked.info.status == "FAILED"
    with pytest.raises(CannotCancel, match="is over"):
        platform.cancel(first)
    second = platform.submit("weather", only=TRAINING_ASSETS)
    trained(second, 1)
    (again,) = trainings(platform.environment.mlflow, dagster_run=second)
    assert curve(platform.environment.mlflow, again.info.run_id, "loss")[0][0] >= reached
    platform.cancel(second)
    *_, last = platform.watched(second).states()
    assert last.state == "CANCELED"
    done = [(one["actor"], one["action"]) for one in platform.ledger.audit_events() if one["subject"] == first]
    assert done == [("tester", "submit"), ("grace", "cancel")]


def test_what_is_not_there_is_an_error(platform: Platform) -> None:
    with pytest.raises(UnknownTask, match="there is no task 'weathr'"):
        platform.submit("weathr")
    with pytest.raises(SpecError, match="Did you mean 'adapter'"):
        platform.submit("weather", only=["adaptr"])
    with pytest.raises(UnknownRun, match="'0123abcd'"):
        platform.cancel("0123abcd")
    with pytest.raises(UnknownRun, match="'0123abcd'"):
        platform.status("0123abcd")
    home = str(platform.environment.home)
    asked = CliRunner().invoke(app, ["status", "0123abcd", "--home", home])
    assert asked.exit_code == 2
    assert "UnknownRun" in asked.output


def test_the_tags_of_a_run_tell_what_started_it() -> None:
    assert triggered_by({"ft/actor": "ada"}) == "user ada"
    assert triggered_by({"dagster/sensor_name": "retraining"}) == "sensor retraining"
    assert triggered_by({"dagster/schedule_name": "nightly"}) == "schedule nightly"
    assert triggered_by({}).startswith("user, through the Dagster UI")
