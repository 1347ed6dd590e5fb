"""A training process that is killed: the run tries again by itself and ends with the bytes of an undisturbed one."""

import threading
from pathlib import Path

import pandas as pd
import psutil

from tests.graph.small_task import TASK, Built, open_home, write_task

SPLITS = ["train_split", "validation_split", "test_split"]
UP_TO_ADAPTER = ["raw_dataset", "clean_dataset", *SPLITS, "search_results", "adapter"]


def kill_first_training(over: threading.Event, killed: list[int]) -> None:
    """SIGKILL the first training worker below this process, once it has loaded its libraries and runs."""
    while not over.wait(0.1):
        for process in psutil.Process().children(recursive=True):
            try:
                training = "ft_assets.training.worker" in process.cmdline()
                if training and process.memory_info().rss > 300 * 1024 * 1024:
                    process.kill()
                    killed.append(process.pid)
                    return
            except psutil.NoSuchProcess:
                continue


def test_a_killed_training_is_repeated_and_gives_the_same_bytes(
    built: Built, tmp_path: Path, training_mails: pd.DataFrame
) -> None:
    platform = open_home(tmp_path / "home")
    platform.add_task(write_task(tmp_path / "mine", rows=training_mails))
    over, killed, notes = threading.Event(), list[int](), list[str]()
    thread = threading.Thread(target=kill_first_training, args=(over, killed))
    thread.start()
    try:
        outcome = platform.materialise(TASK, only=UP_TO_ADAPTER, show=lambda line: notes.append(line.text))
    finally:
        over.set()
        thread.join()
    assert killed
    assert any("tried again" in note for note in notes)
    assert outcome.succeeded, outcome
    undisturbed = open_home(built.home).lake.require(TASK, "adapter")
    repeated = platform.lake.require(TASK, "adapter")
    weights = ("adapter_model.safetensors", "head.safetensors", "training.json")
    assert {name: repeated.files[name] for name in weights} == {name: undisturbed.files[name] for name in weights}
