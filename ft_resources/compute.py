"""Launching workers through Dagster Pipes: as a subprocess on this machine, or as a pod on Kubernetes."""

import sys
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from ft_resources import errors
from ft_resources.environments import Environment

# dagster warns that a part of its own Pipes client is a preview
warnings.filterwarnings("ignore", category=dg.PreviewWarning, message=".*PipesMessageReader.*")

WORKER_VARIABLES = {
    "PYTHONWARNINGS": "ignore",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what deterministic CUDA kernels need
    # threads wait actively for microseconds only: many times as fast where other processes want the cores too
    "GOMP_SPINCOUNT": "20000",
}
GRACE_SECONDS = 120.0
"""For the step under way and the checkpoint of a worker that is asked to end."""


class WorkerDied(errors.FtError):
    """A worker ended without a result: killed, out of memory, or a defect. Worth another try."""

    code = "worker_died"


class Compute(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Where training and evaluation run."""

    kind: Literal["local", "kubernetes"] = Field("local", description="local: a subprocess; kubernetes: a pod.")
    image: str = Field("", description="Image of the pod (kubernetes).")
    namespace: str = Field("default", description="Namespace of the pod (kubernetes).")
    gpus: int = Field(0, ge=0, description="nvidia.com/gpu limit of the pod (kubernetes).")
    cpu: str = Field("2", description="CPU request of the pod (kubernetes).")
    memory: str = Field("4Gi", description="Memory request of the pod (kubernetes).")
    timeout_minutes: float = Field(240, gt=0, description="A pod that waits or runs longer is given up (kubernetes).")

    def run(
        self, context: dg.AssetExecutionContext, module: str, job: Mapping[str, Any], *, processes: int = 1
    ) -> dict[str, Any]:
        """Run `python -m module` with `job` and return what it reports.

        Args:
            processes: How many work together; more than one are started by torchrun.

        Raises:
            FtError: The typed error the worker reported.
            WorkerDied: It ended without reporting anything.
            DagsterExecutionInterruptedError: The run was stopped; the worker had `GRACE_SECONDS` to save its state.
        """
        try:
            messages = self._launch(context, module, job, processes)
        except Exception as error:
            # what the Pipes clients raise when a process ends badly is not exported by dagster: recognise it by name
            if type(error).__name__ not in ("DagsterPipesExecutionError", "DagsterK8sError"):
                raise
            raise _died(module, str(error)) from error
        for message in messages:
            if "error" in message:
                raise _typed(message["error"])
            if "result" in message:
                result: dict[str, Any] = message["result"]
                return result
        raise _died(module, "it reported no result")

    def _launch(
        self, context: dg.AssetExecutionContext, module: str, job: Mapping[str, Any], processes: int
    ) -> list[Any]:
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = ["python", *(several if processes > 1 else []), "-m", module]
        variables = {**Environment.read().variables(), **WORKER_VARIABLES}
        if self.kind == "local":
            client = dg.PipesSubprocessClient(env=variables, termination_timeout_seconds=GRACE_SECONDS)
            return list(
                client.run(
                    context=context, command=[sys.executable, *command[1:]], extras={"job": dict(job)}
                ).get_custom_messages()
            )
        from dagster_k8s import PipesK8sClient

        pod = PipesK8sClient().run(
            context=context,
            image=self.image,
            command=command,
            namespace=self.namespace,
            env=variables,
            base_pod_spec=self.pod_spec(),
            extras={"job": dict(job)},
            pod_wait_timeout=self.timeout_minutes * 60,
        )
        return list(pod.get_custom_messages())

    def pod_spec(self) -> dict[str, Any]:
        """The pod that a worker gets on Kubernetes: never restarted by the kubelet, limits stated."""
        limits = {"nvidia.com/gpu": str(self.gpus)} if self.gpus else {}
        resources = {"requests": {"cpu": self.cpu, "memory": self.memory}, "limits": limits}
        return {
            "restartPolicy": "Never",
            "containers": [{"name": "dagster-pipes-execution", "resources": resources}],
        }


def _died(module: str, why: str) -> WorkerDied:
    return WorkerDied(
        f"the worker {module} ended without a result ({why})",
        where="its output is in the run's compute log",
        mend="Nothing was published. Run again; if memory was short, lower training.batch_size or base.max_tokens.",
    )


def _typed(description: Mapping[str, str]) -> errors.FtError:
    kind = getattr(errors, description["type"], errors.FtError)
    return kind(description["what"], where=description["where"], mend=description["mend"])
