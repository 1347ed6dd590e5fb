"""What is booked of a training that ended without an adapter: what its worker told, else what was sampled."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ft_assets.training.failures import ENVIRONMENT, FAILURE, RESOURCES, results_folder
from ft_assets.training.records import recorded
from ft_resources.compute import WorkerDied
from ft_resources.environments import Environment
from ft_resources.errors import FtError, TrainingError
from ft_resources.ledger import Ledger
from ft_resources.usage import Meter, Usage

MADE: dict[str, Any] = {
    "task": "mail",
    "train_split": "1" * 64,
    "validation_split": "2" * 64,
    "settings": {"base": {"model": "package:small/model"}, "method": "lora"},
    "base": "b" * 64,
    "environment": {},
}
JOB: dict[str, Any] = {
    "made_from": MADE,
    "key": "f" * 64,
    "trace": {},
    "origins": {},
    "template": "encoder-lora@1",
    "run_name": "mail 1a2b3c4d",
    "tags": {"dagster_run_id": "1a2b3c4d-0000-0000"},
}
TOLD = Usage(60.0, 90.0, 0.0, 3_000_000_000, 0, 0.2, "rapl")


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment.read({}, home=tmp_path)


def booked(environment: Environment, error: FtError, files: Mapping[str, str] = {}) -> dict[str, Any]:
    """The ledger's row of a training that leaves these files and ends with this error."""
    ledger, folder = Ledger(environment.ledger), results_folder(environment, "mail", JOB["run_name"])

    def ends() -> None:
        with recorded(ledger, environment, JOB):
            for name, text in files.items():
                (folder / name).write_text(text)
            raise error

    with pytest.raises(type(error)):
        ends()
    (row,) = ledger.training_runs().to_dict("records")
    ledger.close()
    return row


def told(usage: Usage | None) -> str:
    return json.dumps({"usage": usage and asdict(usage), "provenance": {"hardware": {"gpus": None}}})


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("metered") / RESOURCES
    with Meter(seconds=0.02, file=file):
        sum(range(3_000_000))
    return file.read_text()


def test_what_the_worker_told_is_booked(environment: Environment, sampled: str) -> None:
    row = booked(environment, TrainingError("no"), {RESOURCES: sampled, ENVIRONMENT: told(TOLD), FAILURE: "{}"})
    assert (row["status"], row["error"]) == ("FAILED", "training_failed")
    assert {name: row[name] for name in asdict(TOLD)} == asdict(TOLD)
    assert row["cost"] > 0


@pytest.mark.parametrize("left", [{}, {ENVIRONMENT: '{"usage": {"wall_sec'}])
def test_a_worker_that_told_nothing_is_booked_as_it_was_sampled(
    left: dict[str, str], environment: Environment, sampled: str
) -> None:
    row = booked(environment, TrainingError("no"), {RESOURCES: sampled, **left})
    last = sampled.splitlines()[-1].split(",")
    assert row["wall_seconds"] == float(last[0])
    assert row["energy_source"] == "estimate"


def test_a_worker_that_never_began_took_nothing(environment: Environment) -> None:
    row = booked(environment, TrainingError("no"))
    assert row["status"] == "FAILED"
    assert all(pd.isna(row[name]) for name in (*asdict(TOLD), "cost"))


def test_a_killed_worker_gets_its_results_written_with_what_it_used(environment: Environment, sampled: str) -> None:
    row = booked(environment, WorkerDied("killed, exit code -9"), {RESOURCES: sampled})
    folder = results_folder(environment, "mail", JOB["run_name"])
    assert json.loads((folder / FAILURE).read_text())["type"] == "WorkerDied"
    written = json.loads((folder / ENVIRONMENT).read_text())["usage"]
    assert {name: row[name] for name in written} == written
    assert row["cpu_seconds"] > 0


def test_what_an_earlier_attempt_left_is_not_booked_again(environment: Environment, sampled: str) -> None:
    folder = results_folder(environment, "mail", JOB["run_name"])
    for name, text in ((RESOURCES, sampled), (ENVIRONMENT, told(TOLD)), (FAILURE, "{}")):
        (folder / name).write_text(text)
        os.utime(folder / name, (1, 1))
    assert pd.isna(booked(environment, TrainingError("no"))["wall_seconds"])
