"""The Helm chart of MLflow: rendered by Helm's own library, checked against Kubernetes' schemas, its commands run."""

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import helm_python
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from ft_assets.cli import app
from tests.resources.charts import RELEASED, Chart, container, pod, variables

CHART = Chart(
    "mlflow",
    "tracking",
    {
        "database": {"secret": "mlflow-database"},
        "artifacts": {"destination": "s3://bucket/mlflow", "credentialsSecret": "mlflow-bucket"},
        "backup": {"image": "registry/ft-backup:1", "destination": "s3://bucket/backups"},
    },
)
with_, rendered = CHART.with_, CHART.rendered


def test_the_chart_renders_a_server_without_state_on_an_external_database_and_bucket() -> None:
    objects = rendered()
    assert sorted(objects) == ["CronJob", "Deployment", "Job", "PodDisruptionBudget", "Service"]
    server = objects["Deployment"]
    assert server["spec"]["replicas"] == 2 and server["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert container(server)["image"] == "ghcr.io/mlflow/mlflow:v3.17.2-full"
    assert {"--serve-artifacts", "--artifacts-destination=s3://bucket/mlflow"} <= set(container(server)["command"])
    assert variables(server)["MLFLOW_BACKEND_STORE_URI"] == {"secretKeyRef": {"name": "mlflow-database", "key": "uri"}}
    assert container(server)["envFrom"] == [{"secretRef": {"name": "mlflow-bucket"}}]
    assert {"livenessProbe", "readinessProbe", "startupProbe"} <= container(server).keys()
    labels = server["spec"]["template"]["metadata"]["labels"]
    for chosen in (
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert chosen.items() <= labels.items() and chosen["app.kubernetes.io/component"] == "server"
    backup = objects["CronJob"]
    assert backup["spec"]["schedule"] == "17 2 * * *" and "--keep=14" in container(backup)["command"]
    for one in (server, backup, objects["Job"]):
        assert pod(one)["securityContext"]["runAsNonRoot"] and not pod(one)["enableServiceLinks"]
        assert container(one)["securityContext"]["readOnlyRootFilesystem"]
        assert pod(one)["volumes"][0].keys() == {"name", "emptyDir"}


@pytest.mark.parametrize("version", RELEASED)
@pytest.mark.parametrize(
    "values",
    [
        CHART.values,
        with_(
            "artifacts", {"destination": "s3://b", "serviceAccount": "a", "endpoint": "http://s3:9000", "region": "x"}
        ),
        {**with_("backup", {"enabled": False}), "imagePullSecrets": [{"name": "r"}], "allowedHosts": ["*.example"]},
    ],
)
def test_every_object_is_one_that_kubernetes_takes(values: dict[str, Any], version: str) -> None:
    CHART.validate(values, version)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("database.secret", "", "database.secret is required"),
        ("artifacts.destination", "", "artifacts.destination is required"),
        ("artifacts.destination", "/mnt/artefacts", "not shared by the replicas"),
        ("artifacts.destination", "file:///mnt/artefacts", "not shared by the replicas"),
        ("artifacts.credentialsSecret", "", "artifacts.credentialsSecret or artifacts.serviceAccount is required"),
        ("backup.image", "", "backup.image is required"),
        ("backup.destination", "", "backup.destination is required"),
        ("backup.destination", "s3://bucket/mlflow/backups", "lies below artifacts.destination"),
        ("replicas", 1, "minimum: got 1, want 2"),
        ("artefacts.destination", "s3://b", "additional properties 'artefacts' not allowed"),
    ],
)
def test_what_is_missing_or_wrong_is_refused_by_name(path: str, value: Any, said: str) -> None:
    with pytest.raises(helm_python.HelmError, match=said):
        rendered(with_(path, value))


@pytest.fixture
def database(postgres: str) -> Iterator[str]:
    server = sa.make_url(postgres)
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE chart")
    yield server.set(database="chart").render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.exec_driver_sql("DROP DATABASE chart WITH (FORCE)")


def command(one: dict[str, Any], replaced: dict[str, str]) -> list[str]:
    """The container's command with `replaced` put in, such as a folder for the bucket that is not here."""
    words = list(container(one)["command"])
    for before, after in replaced.items():
        words = [word.replace(before, after) for word in words]
    return words


@contextmanager
def served(words: list[str], environment: dict[str, str]) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [f"--port={port}" if word.startswith("--port=") else word for word in words]
    process = subprocess.Popen([sys.executable, "-m", *words], env=environment, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        while status(f"{address}/health", "any") != 200:
            with pytest.raises(subprocess.TimeoutExpired):  # it is still starting
                process.wait(0.2)
        yield address, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.wait()


def status(url: str, host: str) -> int | None:
    """HTTP status of a request that names `host`; None before anyone listens."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host}), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.mark.slow
def test_a_replica_goes_on_where_a_killed_one_was_and_the_backup_brings_the_run_back(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    objects, artifacts = rendered(with_("backup.databaseOnly", False)), str(tmp_path / "artefacts")
    replaced = {
        "s3://bucket/mlflow": artifacts,
        "s3://bucket/backups": str(tmp_path / "backups"),
        "$(MLFLOW_BACKEND_STORE_URI)": database,
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", database)
    monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", artifacts)
    monkeypatch.setenv(
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION", variables(objects["Deployment"])["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"]
    )
    subprocess.run([sys.executable, "-m", *command(objects["Job"], replaced)], check=True)
    words = command(objects["Deployment"], replaced)
    with served(words, dict(os.environ)) as (one, process), served(words, dict(os.environ)) as (other, _):
        first, second = MlflowClient(one), MlflowClient(other)
        run = first.create_run(first.create_experiment("ft/mail")).info.run_id
        for step in range(3):
            first.log_metric(run, "loss", 1 / (step + 1), step=step)
        first.log_text(run, "weights", "adapter/adapter.bin")
        first.create_registered_model("mail")
        first.create_model_version("mail", f"runs:/{run}/adapter", run)
        first.set_terminated(run)
        os.killpg(process.pid, 9)
        assert [point.value for point in second.get_metric_history(run, "loss")] == [1, 1 / 2, 1 / 3]
        fetched = second.download_artifacts(run, "adapter/adapter.bin", str(tmp_path))
        assert Path(fetched).read_text() == "weights"
        # who calls it by its name in the cluster is let in
        question = f"{other}/api/2.0/mlflow/registered-models/get?name=mail"
        for host in ("tracking-mlflow.ml.svc:5000", "tracking-mlflow", "localhost:5000"):
            assert status(question, host) == 200
        assert status(question, "elsewhere.example") == 403

        for words in (command(objects["CronJob"], replaced), ["ft", "tracking", "drill", str(tmp_path / "backups")]):
            done = CliRunner().invoke(app, words[1:])
            assert done.exit_code == 0, done.output
    assert f"run {run} is back with 0 params, 3 points of 1 metrics, 1 artefacts, versions mail/1" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.bin", "artefacts", "backups"]
