"""Trainings and adapters over HTTP: listed, filtered, counted; what MLflow knows; who sees what."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ft_resources.tracking import TrackedRun
from tests.api.conftest import Api, bearer
from tests.resources.test_training_runs import NOON


def listed(api: Api, **filters: Any) -> list[str]:
    answer = api.client.get("/experiments", params=filters)
    assert answer.status_code == 200, answer.text
    return [one["run_id"] for one in answer.json()["data"]]


def test_after_three_trainings_three_are_listed_newest_first(api: Api) -> None:
    assert listed(api, task="mail") == ["best", "poor", "bad"]
    best, _, bad = api.client.get("/experiments", params={"task": "mail"}).json()["data"]
    assert (best["accuracy"], best["tokens"], best["loss"]) == (0.97, 5_000_000_000, None)
    assert best["started"] == "2026-03-01T12:00:00Z"
    assert (bad["status"], bad["error"], bad["wall_seconds"]) == ("FAILED", "out_of_memory", None)


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({"min_accuracy": 0.9}, ["best", "elsewhere"]),
        ({"max_seconds": 100}, ["best", "elsewhere"]),
        ({"since": NOON.isoformat()}, ["best", "poor"]),
        ({"until": NOON.isoformat()}, ["bad", "elsewhere"]),
        ({"since": "2026-02-27", "until": "2026-02-28"}, ["bad"]),
        ({"since": (NOON - timedelta(hours=1)).isoformat(), "min_accuracy": 0.9}, ["best"]),
        ({"status": "FAILED"}, ["bad"]),
        ({"task": "news"}, ["elsewhere"]),
        ({"task": "nothing"}, []),
        ({"limit": 1, "offset": 1}, ["poor"]),
        ({"offset": 99}, []),
    ],
)
def test_each_filter(api: Api, filters: dict[str, Any], found: list[str]) -> None:
    assert listed(api, **filters) == found


@pytest.mark.parametrize(
    "filters",
    [{"min_acuracy": 0.9}, {"min_accuracy": "good"}, {"max_seconds": -1}, {"since": "soon"}, {"status": "RUNNING"}],
)
def test_a_filter_that_means_nothing_is_refused_by_name(api: Api, filters: dict[str, Any]) -> None:
    refused = api.client.get("/experiments", params=filters)
    assert refused.status_code == 422
    assert refused.json()["error_code"] == "invalid_request"
    assert next(iter(filters)) in refused.json()["where"]


def test_statistics_by_base_model_and_by_dataset(api: Api) -> None:
    counted = api.client.get("/experiments/statistics", params={"by": "base", "task": "mail"}).json()
    assert [(one["value"], one["runs"], one["failed"]) for one in counted["data"]] == [
        ("package:small/model", 2, 1),
        ("folder/other", 1, 0),
    ]
    assert counted["data"][0]["best_accuracy"] == 0.97
    assert counted["data"][0]["cost"] is None
    (dataset,) = api.client.get("/experiments/statistics", params={"by": "dataset"}).json()["data"]
    assert (dataset["value"], dataset["runs"], dataset["newest"]) == ("1" * 64, 4, "2026-03-01T12:00:00Z")


def test_a_caller_sees_the_trainings_of_its_tasks_only(api: Api, shown: dict[str, str]) -> None:
    key = bearer(shown["reader of mail"])
    assert len(api.client.get("/experiments", headers=key).json()["data"]) == 3
    (dataset,) = api.client.get("/experiments/statistics", params={"by": "dataset"}, headers=key).json()["data"]
    assert dataset["runs"] == 3
    assert api.client.get("/experiments", params={"task": "news"}, headers=key).status_code == 403
    assert {one["task"] for one in api.client.get("/adapters", headers=key).json()["data"]} == {"mail"}


def test_an_adapter_is_shown_with_the_hash_of_every_file_unless_one_was_changed(
    api: Api, adapter: str, home: Path
) -> None:
    rows = api.client.get("/adapters", params={"task": "mail"}).json()
    assert [one["digest"] for one in rows["data"]] == [adapter]
    found = api.client.get(f"/adapters/{adapter[:12]}").json()
    assert (found["run_id"], found["training_rows_digest"], found["accuracy"]) == ("best", "1" * 64, 0.97)
    assert found["url"] == f"{home}/lake/objects/{adapter[:2]}/{adapter}"
    assert list(found["files"]) == ["adapter.json"] and found["files"]["adapter.json"]["size"] == 2
    for unknown in (adapter[:4], "0" * 64, "x"):
        refused = api.client.get(f"/adapters/{unknown}")
        assert (refused.status_code, refused.json()["error_code"]) == (404, "unknown_adapter")
    file = home / "lake" / "objects" / adapter[:2] / adapter / "adapter.json"
    file.chmod(0o644)
    file.write_text("[]")
    damaged = api.client.get(f"/adapters/{adapter}")
    file.write_text("{}")
    assert (damaged.status_code, damaged.json()["error_code"]) == (500, "artefact")
    assert damaged.json()["mend"]


def test_what_mlflow_knows_of_a_training_that_runs(
    api: Api, home: Path, shown: dict[str, str], tracker_in: Callable[[Path], str]
) -> None:
    assert api.client.get("/mlflow").json()["data"] == []
    run = TrackedRun(tracker_in(home), "news", "r", {"dagster_run_id": "d", "task": "news"})
    run.params({"steps": 4})
    for step in range(1, 5):
        run.metrics({"loss": 1 / step, "memory_gb": float("inf")}, step)
    run.flush()
    found = api.client.get(f"/experiments/mlflow/{run.run_id}", params={"curve": ["loss", "none"]}).json()
    assert (found["task"], found["status"], found["dagster_run_id"]) == ("news", "RUNNING", "d")
    assert found["params"] == {"steps": "4"}
    assert found["curves"] == {"loss": {"steps": [1, 2, 3, 4], "values": [1.0, 0.5, pytest.approx(1 / 3), 0.25]}}
    tracker = api.client.get("/mlflow").json()
    assert (tracker["url"], tracker["data"][0]["task"], tracker["data"][0]["newest"]) == (None, "news", run.run_id)
    key = bearer(shown["reader of mail"])
    assert api.client.get("/mlflow", headers=key).json()["data"] == []
    assert api.client.get(f"/experiments/mlflow/{run.run_id}", headers=key).status_code == 403
    for unknown in ("0" * 32, "best"):
        refused = api.client.get(f"/experiments/mlflow/{unknown}")
        assert (refused.status_code, refused.json()["error_code"]) == (404, "unknown_run")
    run.finish("FINISHED")
