"""MLflow: runs with their steps, versions with aliases, and dagster-mlflow beside them on the same store."""

from pathlib import Path

import dagster as dg
import pytest

from ft_resources.errors import ArtefactError
from ft_resources.tracking import TRAINED_FROM, ModelRegistry, TrackedRun, client


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def finished(uri: str, task: str, adapter: str, folder: Path) -> str:
    run = TrackedRun(uri, task, "a run", {"dagster_run_id": "d-1", TRAINED_FROM: adapter})
    run.params({"lora.rank": 4})
    for step in range(1, 6):
        run.metrics({"loss": 1 / step}, step)
    (folder / "adapter.json").write_text("{}")
    run.finish("FINISHED", folder, {"adapter": adapter})
    return run.run_id


def test_every_step_is_kept(uri: str, tmp_path: Path) -> None:
    run_id = finished(uri, "steps", "a" * 64, tmp_path)
    history = client(uri).get_metric_history(run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1 / step) for step in range(1, 6)]
    assert ModelRegistry(uri).run_of("steps", "a" * 64) == run_id
    with pytest.raises(ArtefactError, match="no MLflow run of task"):
        ModelRegistry(uri).run_of("steps", "b" * 64)


def test_an_adapter_is_registered_once_and_one_version_is_champion(uri: str, tmp_path: Path) -> None:
    registry = ModelRegistry(uri)
    for adapter in ("1" * 64, "2" * 64):
        run_id = finished(uri, "versions", adapter, tmp_path)
        card = {"model_card.json": f'{{"adapter": "{adapter}"}}', "model_card.md": "# card"}
        versions = {
            registry.register(
                "versions", adapter, run_id=run_id, source=tmp_path.as_uri(), card=card, tags={"report": "r"}
            )
            for _ in range(2)
        }
        assert len(versions) == 1
        registry.set_alias("versions", "champion", versions.pop())
    assert registry.alias("versions", "champion") == "2"
    assert registry.card("versions", "1")["adapter"] == "1" * 64
    assert registry.alias("versions", "challenger") is None
    assert registry.alias("nothing", "champion") is None


def test_tasks_do_not_share_versions(uri: str, tmp_path: Path) -> None:
    registry = ModelRegistry(uri)
    run_id = finished(uri, "other.versions", "1" * 64, tmp_path)
    version = registry.register("other.versions", "1" * 64, run_id=run_id, source=tmp_path.as_uri(), card={}, tags={})
    assert version == "1"


@pytest.mark.filterwarnings("ignore")
def test_dagster_mlflow_writes_to_the_same_store_with_the_same_tag(uri: str) -> None:
    """Users who bring dagster-mlflow find its runs beside the platform's, joined by the tag dagster_run_id."""
    from dagster_mlflow import end_mlflow_on_run_finished, mlflow_tracking

    @dg.op(required_resource_keys={"mlflow"})
    def note(context: dg.OpExecutionContext) -> None:
        context.resources.mlflow.log_params({"brought": "along"})

    @end_mlflow_on_run_finished
    @dg.job(resource_defs={"mlflow": mlflow_tracking})
    def own() -> None:
        note()

    config = {"mlflow": {"config": {"experiment_name": "own", "mlflow_tracking_uri": uri}}}
    result = own.execute_in_process(run_config={"resources": config})
    assert result.success
    connection = client(uri)
    (run,) = connection.search_runs([connection.get_experiment_by_name("own").experiment_id])
    assert run.data.tags["dagster_run_id"] == result.run_id
    assert run.info.status == "FINISHED"
