"""A training process that is killed: the run goes on by itself and ends with the bytes of an undisturbed one."""

import os
import signal
from pathlib import Path

import dagster as dg
import pandas as pd
import psutil
import pytest

from ft_assets.following import Line
from ft_assets.materialising import typed_failures
from ft_assets.platform import TRAINING_ASSETS, Platform
from ft_assets.training.relief import reliefs_of
from ft_resources.environments import Environment
from tests.graph.small_task import TASK, TASK_FILE, Built, open_home, write_task

WEIGHTS = ("adapter_model.safetensors", "head.safetensors", "training.json")
OFTEN = TASK_FILE.replace("epochs: 1,", "epochs: 1, checkpoint_minutes: 0.001,")
"""The small task with a checkpoint after every step, nearly."""


class Interruptor:
    """Sends a signal to the training worker when the run's log shows one of its steps, as often as asked."""

    def __init__(self, number: signal.Signals, times: int) -> None:
        self.number, self.times = number, times
        self.notes, self.hit = list[str](), list[int]()

    def __call__(self, line: Line) -> None:
        text = line.text
        self.notes.append(text)
        if not text.startswith("step ") or len(self.hit) == self.times:
            return
        for process in psutil.Process().children(recursive=True):
            try:
                worker = "ft_assets.training.worker" in process.cmdline()
            except psutil.NoSuchProcess:
                continue
            if worker and process.pid not in self.hit:
                os.kill(process.pid, self.number)
                self.hit.append(process.pid)


def test_an_interrupted_run_does_not_try_its_step_again() -> None:
    """Ctrl-C, or SIGTERM from `ft cancel` and from a cluster, in a run of this process."""
    tries = []

    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=2))
    def trained() -> None:
        with typed_failures():
            tries.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    job = dg.Definitions([trained], jobs=[dg.define_asset_job("all")]).resolve_job_def("all")
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        ended = job.execute_in_process(instance=instance, raise_on_error=False, run_config=quiet)
    assert not ended.success
    assert tries == [1]
    assert "the run was stopped" in str(ended.failure_data_for_node("trained"))


def steps_told(notes: list[str]) -> list[int]:
    return [int(note.split()[1].split("/")[0]) for note in notes if note.startswith("step ")]


@pytest.mark.parametrize(
    ("number", "times"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGKILL, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_training_goes_on_and_gives_the_same_bytes(
    number: signal.Signals, times: int, built: Built, tmp_path: Path, training_mails: pd.DataFrame
) -> None:
    platform = open_home(tmp_path / "home")
    platform.add_task(write_task(tmp_path / "mine", OFTEN, training_mails))
    interruptor = Interruptor(number, times)
    outcome = platform.materialise(TASK, only=TRAINING_ASSETS, show=interruptor)
    assert len(interruptor.hit) == times
    assert sum("tried again" in note for note in interruptor.notes) == times
    assert outcome.succeeded, outcome
    undisturbed = open_home(built.home).lake.require(TASK, "adapter")
    repeated = platform.lake.require(TASK, "adapter")
    assert {name: repeated.files[name] for name in WEIGHTS} == {name: undisturbed.files[name] for name in WEIGHTS}
    again = next(at for at, note in enumerate(interruptor.notes) if "tried again" in note)
    before, after = steps_told(interruptor.notes[:again]), steps_told(interruptor.notes[again:])
    assert after[0] > before[0], "it began anew instead of going on"
    attempts = platform.experiments(TASK)
    assert sorted(attempts["status"]) == ["FAILED"] * times + ["FINISHED"]
    assert (attempts[["wall_seconds", "cpu_seconds", "peak_memory_bytes", "cost"]] > 0).all(axis=None), "all cost"


LATE = TASK_FILE.replace("max_tokens: 48", "max_tokens: 128").replace(
    "epochs: 1,", "epochs: 2, batch_size: 64, first_epoch_tokens: 8, checkpoint_minutes: 0.001,"
)
"""The small task with little memory at first: whole texts come in the second epoch only."""


@pytest.mark.slow
def test_a_training_that_runs_out_of_memory_goes_on_in_smaller_parts(
    built: Built, tmp_path: Path, training_mails: pd.DataFrame
) -> None:
    small = open_home(built.home).experiments(TASK)["peak_memory_bytes"].max()
    limit = {"FT_TASKS": str(tmp_path / "home" / "tasks"), "FT_MEMORY_GB": str(small / 1e9 + 0.6)}
    platform = Platform(Environment.read(limit, home=tmp_path / "home"))
    platform.add_task(write_task(tmp_path / "mine", LATE, training_mails))
    notes = list[str]()
    outcome = platform.materialise(TASK, only=TRAINING_ASSETS, show=lambda line: notes.append(line.text))
    assert outcome.succeeded, (outcome, notes)
    relieved = [note for note in notes if "needs more memory than there is" in note and "goes on after step" in note]
    assert relieved, "\n".join(notes)
    adapter = platform.lake.require(TASK, "adapter")
    reliefs = reliefs_of(adapter.made_from)
    steps = len(adapter.json("training.json")["loss"])
    assert len(reliefs) == len(relieved)
    assert all(steps // 2 <= relief.after_step < steps for relief in reliefs), "it began anew in place of going on"
    told = steps_told(notes)
    assert told == sorted(told)
    assert sorted(platform.experiments(TASK)["status"]) == ["FAILED"] * len(reliefs) + ["FINISHED"]
    again = platform.materialise(TASK, only=TRAINING_ASSETS, show=lambda line: notes.append(line.text))
    assert again.succeeded
    assert any("is reused" in note for note in notes)
    repeated = open_home(tmp_path / "home").reproduce(adapter.digest)  # with all memory there is
    assert repeated.identical, repeated.verdict
