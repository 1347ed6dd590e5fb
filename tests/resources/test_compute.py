"""Where workers run: typed errors cross the process boundary, a dead worker is told apart, pods are as intended."""

import json
from pathlib import Path

import dagster as dg
import pytest

from ft_resources.compute import Compute, WorkerDied
from ft_resources.errors import TrainingError

WORKER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from ft_assets.worker import serve
from ft_resources.errors import TrainingError

def work(job, progress):
    if job["end"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job["end"] == "refused":
        raise TrainingError("the loss became nan", where="step 3", mend="Lower the rate.")
    if job["end"] == "crashed":
        raise ZeroDivisionError
    progress("half done", force=True)
    return {{"doubled": job["value"] * 2}}

serve(work)
"""


def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: dict) -> dict:
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "small_worker.py").write_text(WORKER.format(root=str(root)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answers: list[dict] = []

    @dg.asset
    def asked(context: dg.AssetExecutionContext, compute: Compute) -> dg.MaterializeResult:
        answers.append(compute.run(context, "small_worker", job))
        return dg.MaterializeResult()

    with dg.DagsterInstance.ephemeral() as instance:
        dg.materialize([asked], resources={"compute": Compute()}, instance=instance)
    return answers[0]


def test_the_result_of_a_worker_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch(tmp_path, monkeypatch, {"end": "well", "value": 21}) == {"doubled": 42}


def test_a_typed_error_keeps_its_type_and_its_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError) as caught:
        launch(tmp_path, monkeypatch, {"end": "refused"})
    assert (caught.value.where, caught.value.mend) == ("step 3", "Lower the rate.")


@pytest.mark.parametrize("end", ["killed", "crashed"])
def test_a_worker_that_dies_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    with pytest.raises(WorkerDied, match="ended without a result"):
        launch(tmp_path, monkeypatch, {"end": end})


def test_a_pod_is_never_restarted_behind_the_run_and_names_its_gpus() -> None:
    spec = Compute(kind="kubernetes", image="registry/ft:1", gpus=2).pod_spec()
    assert spec["restartPolicy"] == "Never"
    assert spec["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "2"}


def test_the_pod_renders_as_a_kubernetes_object() -> None:
    """dagster-k8s merges this spec into the pod it creates: build that pod, without a cluster."""
    from dagster_k8s.models import k8s_model_from_dict
    from kubernetes.client import ApiClient, V1PodSpec

    spec = Compute(kind="kubernetes", gpus=1).pod_spec()
    rendered = ApiClient().sanitize_for_serialization(k8s_model_from_dict(V1PodSpec, _snake(spec)))
    assert json.loads(json.dumps(rendered)) == spec


def _snake(spec: dict) -> dict:
    return {"restart_policy": spec["restartPolicy"], "containers": spec["containers"]}
