"""Trainings in the ledger: recorded, filtered, counted; on SQLite and on a real PostgreSQL server."""

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import sqlalchemy as sa

from ft_resources.errors import ArtefactError
from ft_resources.ledger import Ledger
from ft_resources.training_runs import GROUPINGS, TrainingRun

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def run(name: str, **other: Any) -> TrainingRun:
    started = other.pop("started", NOON)
    values: dict[str, Any] = {
        "run_id": name,
        "dagster_run_id": f"dagster-{name}",
        "task": "mail",
        "status": "FINISHED",
        "trained_from": "f" * 64,
        "training_rows_digest": "1" * 64,
        "validation_rows_digest": "2" * 64,
        "base": "package:small/model",
        "base_digest": "b" * 64,
        "template": "encoder-lora@1",
        "method": "lora",
        "started": started,
        "ended": started + timedelta(seconds=60),
        "adapter": "a" * 64,
        "rows": 500,
        "tokens": 5_000_000_000,  # more than 32 bits
        "steps": 40,
        "wall_seconds": 60.0,
        "peak_memory_bytes": 3_000_000_000,
        "energy_wh": 0.2,
        "energy_source": "estimate",
        "accuracy": 0.9,
        "macro_f1": 0.8,
        "loss": 0.3,
        **other,
    }
    return TrainingRun(**values)


def test_a_run_is_read_back_as_it_was_recorded(ledger: Ledger) -> None:
    ledger.record_training(run("r1", precision="bf16", cost=0.05))
    (row,) = ledger.training_runs().to_dict("records")
    kept = {k: None if pd.isna(v) else v for k, v in row.items()}
    assert kept == run("r1", precision="bf16", cost=0.05).values()
    assert ledger.training_runs()["started"].iloc[0] == pd.Timestamp(NOON)


def test_a_failed_run_has_what_is_known(ledger: Ledger) -> None:
    took = ("rows", "tokens", "steps", "wall_seconds", "peak_memory_bytes", "energy_wh", "energy_source")
    unknown = dict.fromkeys([*took, "accuracy", "macro_f1", "loss", "adapter"])
    ledger.record_training(run("r1", **unknown, status="FAILED", error="out_of_memory"))
    ledger.record_training(run("r2", loss=math.nan, accuracy=math.inf))
    found = ledger.training_runs(status="FAILED")
    assert found["error"].tolist() == ["out_of_memory"]
    assert found["steps"].isna().all() and found["wall_seconds"].isna().all()
    assert ledger.training_runs(status="FINISHED")[["loss", "accuracy"]].isna().all(axis=None)


def test_a_run_recorded_again_is_replaced(ledger: Ledger) -> None:
    ledger.record_training(run("r1", status="FAILED"))
    ledger.record_training(run("r1", status="FINISHED"))
    assert ledger.training_runs()["status"].tolist() == ["FINISHED"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"status": "RUNNING"}, "cannot be recorded as 'RUNNING'"), ({"started": datetime(2026, 1, 1)}, "no time zone")],
)
def test_what_is_no_ended_run_is_refused(ledger: Ledger, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ArtefactError, match=says):
        ledger.record_training(run("r1", **wrong))
    assert ledger.training_runs().empty


def test_filters_combine_and_the_newest_comes_first(ledger: Ledger) -> None:
    ledger.record_training(run("old", started=NOON - timedelta(days=2), accuracy=0.95))
    ledger.record_training(run("slow", accuracy=0.99, wall_seconds=900.0))
    ledger.record_training(run("new", started=NOON + timedelta(hours=1), accuracy=0.7))
    ledger.record_training(run("other", task="news", started=NOON - timedelta(hours=1)))
    ledger.record_training(run("failed", status="FAILED", accuracy=None, wall_seconds=None, started=NOON))

    def found(*task: str, **conditions: Any) -> list[str]:
        return ledger.training_runs(*task, **conditions)["run_id"].tolist()

    assert found() == ["new", "failed", "slow", "other", "old"]
    assert found("mail") == ["new", "failed", "slow", "old"]
    assert found("mail", min_accuracy=0.9) == ["slow", "old"]
    assert found(min_accuracy=0.9, max_seconds=100) == ["other", "old"]
    assert found(since=NOON) == ["new", "failed", "slow"]
    assert found(until=NOON) == ["other", "old"]
    assert found(since=NOON - timedelta(hours=1), until=NOON) == ["other"]
    assert found("nothing") == []
    assert list(ledger.training_runs("nothing").columns) == list(ledger.training_runs().columns)


def test_statistics_by_base_model_and_by_dataset(ledger: Ledger) -> None:
    ledger.record_training(run("r1", accuracy=0.9, cost=1.0))
    ledger.record_training(run("r2", accuracy=0.8, cost=2.0, training_rows_digest="9" * 64))
    ledger.record_training(run("r3", status="FAILED", accuracy=None, started=NOON + timedelta(days=1)))
    ledger.record_training(run("r4", base="package:large/model", task="news"))
    bases = ledger.training_statistics("base").set_index("base")
    assert bases.index.tolist() == ["package:small/model", "package:large/model"]
    small = bases.loc["package:small/model"]
    assert (small["runs"], small["finished"], small["failed"], small["pruned"]) == (3, 2, 1, 0)
    assert (small["best_accuracy"], small["cost"], small["seconds"]) == (0.9, 3.0, 180.0)
    assert small["mean_accuracy"] == pytest.approx(0.85)
    assert small["newest"] == NOON + timedelta(days=1)
    rows = ledger.training_statistics("training_rows_digest", "mail")
    assert rows["runs"].tolist() == [2, 1]
    for by in GROUPINGS:
        assert ledger.training_statistics(by)["runs"].sum() == 4


def test_a_ledger_of_the_version_before_is_brought_up_to_date(database: str, tmp_path: Path) -> None:
    """The first migration alone, a row in it, then the ledger opens it."""
    from alembic import command
    from alembic.config import Config

    from ft_resources import ledger_schema

    (tmp_path / "home").mkdir(exist_ok=True)
    engine = sa.create_engine(database, poolclass=sa.NullPool)
    config = Config()
    config.set_main_option("script_location", str(Path(ledger_schema.__file__).parent / "migrations"))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        assert not sa.inspect(connection).has_table("training_runs")
        approved = {"task": "mail", "adapter": "a", "report": "r", "actor": "ada", "because": "b", "created_at": NOON}
        connection.execute(ledger_schema.approvals.insert().values(**approved))
        connection.commit()
    engine.dispose()
    ledger = Ledger(database)
    assert ledger.approval(task="mail", adapter="a", report="r") is not None
    ledger.record_training(run("r1"))
    assert len(ledger.training_runs()) == 1
    ledger.close()
