"""Watching real runs: a worker process that trains, in this test's Dagster instance or on another machine's tracker."""

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from rich.console import Console

from ft_assets.platform import Platform
from ft_assets.watching import BARS, State, UnknownRun, line, panel, sparkline, watch
from ft_resources.environments import Environment
from ft_resources.tracking import TrackedRun, client, end_abandoned, trainings

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(120)
FT = str(Path(sys.executable).with_name("ft"))

WORKER = """
import json, os, sys, time
import numpy as np
sys.path.insert(0, {root!r})
from ft_resources.tracking import TrackedRun
from ft_resources.usage import Meter

uri, dagster_run, seconds, ending = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
rng = np.random.default_rng(0)
features = rng.normal(size=(2000, 300))
labels = features @ rng.normal(size=300) > 0
weights, steps, done = np.zeros(300), 0, {{}}
with Meter(seconds=0.2) as meter:
    tags = {{"dagster_run_id": dagster_run, "task": "small-mail"}}
    tracked = TrackedRun(uri, "small-mail", "small-mail " + dagster_run[:8], tags, live=meter.now)
    tracked.params({{"steps": 1000, "epochs": 4, "run": dagster_run}})
    print(tracked.run_id, flush=True)
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        steps += 1
        for _ in range(20):
            answers = 1 / (1 + np.exp(-features @ weights))
            weights -= 0.001 * features.T @ (answers - labels) / 20
        loss = float(np.mean(np.log1p(np.exp(-(2 * labels - 1) * (features @ weights)))))
        rate = steps / (time.monotonic() - began)
        metrics = {{"loss": loss, "learning_rate": 1e-3, "tokens_per_second": rate * 100, "eta_seconds": 1000 / rate}}
        done[steps] = time.time()
        tracked.metrics(metrics, steps)
    print(json.dumps(done), flush=True)
    if ending == "killed":
        tracked.flush()
        os.kill(os.getpid(), 9)
    if ending == "wait":
        sys.stdin.read()
    tracked.metrics({{"validation_accuracy": 0.9}}, 1)
    tracked.finish("FINISHED")
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def platform(home: Path, tracker_in: Callable[[Path], str]) -> Iterator[Platform]:
    tracker_in(home)
    opened = Platform(Environment.read({"FT_TASKS": str(home / "tasks")}, home=home))
    yield opened
    opened.instance.dispose()


@pytest.fixture
def finished(platform: Platform) -> str:
    """MLflow run id of a training of `small-mail` that ended, in the Dagster run `dagster-run-id`."""
    run = TrackedRun(platform.environment.mlflow, "small-mail", "r", {"dagster_run_id": "0" * 36, "task": "small-mail"})
    run.params({"steps": 4, "training.epochs": 2})
    for step in range(1, 5):
        run.metrics({"loss": 1 / step, "memory_gb": 1.25}, step)
    run.metrics({"validation_macro_f1": 0.75}, 2)
    run.finish("FINISHED")
    return run.run_id


def started(tmp_path: Path, uri: str, dagster_run: str, seconds: float, ending: str) -> "subprocess.Popen[str]":
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    command = [sys.executable, str(script), uri, dagster_run, str(seconds), ending]
    one_core = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_core)


def plain() -> Console:
    return Console(file=io.StringIO(), width=200, highlight=False)


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def ft(*words: str, home: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "FT_HOME": str(home), "FT_TASKS": str(home / "tasks"), "COLUMNS": "250", **variables}
    for name in ("MLFLOW_TRACKING_URI", "FT_LEDGER", "DAGSTER_HOME", "FT_LAKE"):
        if name not in variables:
            environment.pop(name, None)
    return subprocess.run([FT, *words], capture_output=True, text=True, check=False, env=environment)


def test_every_step_is_seen_within_five_seconds_also_when_none_follows(platform: Platform, tmp_path: Path) -> None:
    uri = platform.environment.mlflow
    trainings(uri)
    client(uri).search_experiments()  # the store is made before the clock runs
    worker = started(tmp_path, uri, "a" * 36, 6.0, "wait")
    assert worker.stdout is not None and worker.stdin is not None
    run_id = worker.stdout.readline().strip()
    seen: dict[int, float] = {}
    console, done = plain(), dict[str, float]()
    watched = platform.watched(run_id)
    finisher = threading.Thread(target=lambda: done.update(json.loads(worker.stdout.readline())))
    finisher.start()
    for state in watched.states():
        seen.setdefault(state.step or 0, time.time())
        console.print(line(state), markup=False)
        if done and state.step == int(max(done, key=int)):  # the last step is seen though the worker does nothing
            worker.stdin.close()
    finisher.join()
    worker.wait(30)
    assert state.state == "FINISHED" and state.succeeded
    assert state.step == max(map(int, done)) > 10
    late = [min(at for step, at in seen.items() if step >= int(number)) - made for number, made in done.items()]
    assert max(late) <= 5, f"{max(late):.1f} s"
    lines = printed(console)
    assert len(set(lines)) >= 4
    assert "small-mail" in lines[0]
    middle = lines[len(lines) // 2]
    for word in ("RUNNING", "/1000", "/4", "loss 0.", "learning rate 1.00e-03", "tokens/s", "left", "memory"):
        assert word in middle
    assert "validation accuracy 0.9000" in lines[-1]
    assert "left" not in lines[-1]


@pytest.mark.slow
def test_a_dagster_run_is_watched_through_its_stages_by_any_of_its_names(platform: Platform, tmp_path: Path) -> None:
    uri, go_on = platform.environment.mlflow, threading.Event()
    run_id = "deadbeef-0000-4000-8000-000000000001"

    @dg.asset
    def clean_rows() -> None:
        assert go_on.wait(60)

    @dg.asset(deps=[clean_rows])
    def trained() -> None:
        worker = started(tmp_path, uri, run_id, 1.0, "well")
        worker.communicate()
        assert worker.returncode == 0

    @dg.asset(deps=[trained])
    def refused() -> None:
        raise dg.Failure("no")

    def execute() -> None:
        job = dg.Definitions([clean_rows, trained, refused], jobs=[dg.define_asset_job("all")]).resolve_job_def("all")
        tags = {"dagster/partition": "small-mail"}
        quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
        with Platform(platform.environment).instance as own:
            job.execute_in_process(instance=own, run_id=run_id, tags=tags, raise_on_error=False, run_config=quiet)

    running = threading.Thread(target=execute)
    running.start()
    states: list[State] = []
    try:
        deadline = time.monotonic() + 60
        while not states and time.monotonic() < deadline:
            try:
                states += [platform.watched(name).read() for name in ("small-mail", "deadbeef", run_id)]
            except UnknownRun:
                continue
        assert {state.name for state in states} == {"small-mail deadbeef"}
        assert {state.succeeded for state in states} == {None}
        for state in platform.watched("small-mail").states():
            states.append(state)
            if state.stage == "clean_rows":
                go_on.set()
    finally:
        go_on.set()
        running.join()
    stages = {state.stage for state in states}
    assert {"clean_rows", "trained"} <= stages
    assert (states[-1].state, states[-1].succeeded, states[-1].stage) == ("FAILURE", False, "")
    assert states[-1].step and states[-1].metrics["validation_accuracy"] == 0.9
    console = plain()
    assert watch(platform.watched("deadbeef"), console).succeeded is False
    (only,) = printed(console)
    assert only.startswith("small-mail deadbeef  FAILURE  step")


@pytest.mark.slow
def test_a_run_of_another_machine_is_watched_through_the_tracker_alone(
    platform: Platform, finished: str, tmp_path: Path
) -> None:
    elsewhere = Environment.read({"MLFLOW_TRACKING_URI": platform.environment.mlflow}, home=tmp_path / "elsewhere")
    other = Platform(elsewhere)
    for name in ("small-mail", "0000", finished):
        state = other.watched(name).read()
        assert (state.training, state.step, state.steps, state.epoch, state.epochs) == (finished, 4, 4, 2, 2)
        assert state.succeeded
    other.instance.dispose()


def test_a_worker_that_was_killed_leaves_no_run_open(platform: Platform, tmp_path: Path) -> None:
    uri = platform.environment.mlflow
    worker = started(tmp_path, uri, "b" * 36, 0.3, "killed")
    output, _ = worker.communicate()
    run_id = output.split()[0]
    assert worker.returncode == -signal.SIGKILL
    assert platform.watched(run_id).read().succeeded is None
    assert end_abandoned(uri, "b" * 36) == [run_id]
    assert platform.watched(run_id).read().succeeded is False
    assert end_abandoned(uri, "b" * 36) == []


@pytest.mark.parametrize("name", ["nothing", "ffff", "f" * 32, "it's", "x%", ""])
def test_an_unknown_run_lists_the_newest(platform: Platform, finished: str, name: str) -> None:
    with pytest.raises(UnknownRun, match=r"The newest: 00000000 \(small-mail, finished\)"):
        platform.watched(name)


def test_an_unknown_run_of_an_empty_home_creates_no_tracker(platform: Platform, home: Path) -> None:
    shutil.rmtree(home / "mlflow")
    with pytest.raises(UnknownRun, match="There are none yet"):
        platform.watched("nothing")
    assert not (home / "mlflow").exists()


def test_the_start_of_several_runs_is_ambiguous(platform: Platform) -> None:
    for end in "12":
        tags = {"dagster_run_id": f"cafe000{end}" + "-" * 28, "task": "t"}
        TrackedRun(platform.environment.mlflow, "t", "r", tags).finish("FINISHED")
    with pytest.raises(UnknownRun, match="2 runs start with 'cafe'"):
        platform.watched("cafe")
    assert platform.watched("cafe0001").read().succeeded


def test_the_command_ends_by_the_run_s_state(platform: Platform, finished: str, home: Path) -> None:
    done = ft("watch", "small-mail", home=home)
    assert (done.returncode, done.stderr) == (0, "")
    (only,) = done.stdout.splitlines()
    assert "FINISHED  step 4/4  epoch 2/2  loss 0.2500  memory 1.25 GB  validation macro_f1 0.7500" in only
    client(platform.environment.mlflow).set_terminated(finished, "FAILED")
    assert ft("watch", "small-mail", "--once", home=home).returncode == 1
    unknown = ft("watch", "nothing", home=home)
    assert unknown.returncode == 2
    assert "UnknownRun" in unknown.stderr and "Traceback" not in unknown.stderr


def test_a_terminal_gets_a_view_that_stays_in_place(platform: Platform, finished: str, home: Path) -> None:
    """On a real pseudo-terminal."""
    ours, theirs = pty.openpty()
    variables = {**os.environ, "FT_HOME": str(home), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen([FT, "watch", "small-mail"], stdout=theirs, stderr=theirs, env=variables)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(30) == 0
    text = shown.decode()
    for word in ("small-mail 00000000", "FINISHED", "4/4", "0.2500", "█▃▂▁", "validation macro_f1"):
        assert word in text
    assert "\x1b[" in text


def test_the_sparkline() -> None:
    assert sparkline([]) == "" == sparkline([float("nan")])
    assert sparkline([2, 2, 2]) == BARS[0] * 3
    assert sparkline([0, 7, float("inf"), 3]) == "▁█▄"
    falling = sparkline([1 / step for step in range(1, 1000)], width=30)
    assert len(falling) == 30
    assert falling[0] == "█" and falling[-1] == "▁"
    assert list(falling) == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("step", "steps", "epochs", "epoch"),
    [(1, 40, 2, 1), (20, 40, 2, 1), (21, 40, 2, 2), (40, 40, 2, 2), (0, 40, 2, 1), (5, None, 2, None)],
)
def test_the_epoch_of_a_step(step: int, steps: int | None, epochs: int, epoch: int | None) -> None:
    assert State("n", "RUNNING", None, step=step, steps=steps, epochs=epochs).epoch == epoch


def test_text_of_a_run_is_no_markup() -> None:
    console = plain()
    state = State("[red]name[/red]", "RUNNING", None, metrics={"eta_seconds": 3725.0, "memory_gb": 2.0})
    console.print(panel(state))
    text = "\n".join(printed(console))
    assert "[red]name[/red]" in text
    assert "1 h 02 min" in text


def test_experiments_are_listed_filtered_and_counted(platform: Platform, home: Path) -> None:
    from tests.resources.test_training_runs import run

    platform.ledger.record_training(run("best", accuracy=0.97))
    platform.ledger.record_training(run("poor", accuracy=0.6, base="package:other/model", method="qlora"))
    unknown: dict[str, Any] = dict.fromkeys(["rows", "tokens", "wall_seconds", "peak_memory_bytes", "accuracy"])
    platform.ledger.record_training(run("bad", status="FAILED", error="out_of_memory", **unknown))
    assert platform.experiments("mail", min_accuracy=0.9)["run_id"].tolist() == ["best"]
    assert platform.experiment_statistics("base")["runs"].tolist() == [2, 1]
    platform.ledger.close()
    done = ft("experiments", home=home)
    assert done.returncode == 0, done.stderr
    for word in ("best", "poor", "out_of_memory", "0.970", "83,333,333", "3.00", "qlora"):
        assert word in done.stdout
    good = ft(
        "experiments", "mail", "--min-accuracy", "0.9", "--since", "2026-03-01", "--status", "finished", home=home
    )
    assert "best" in good.stdout and "poor" not in good.stdout and "bad" not in good.stdout
    counted = ft("experiments", "--by", "base", home=home)
    assert "package:other/model" in counted.stdout and "pruned" in counted.stdout
    assert ft("experiments", "--until", "2020-01-01", home=home).stdout.count("\n") <= 5
