"""What besides rows and settings decides the bytes of an adapter."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version

from ft_assets.training.reporting import expected_device
from ft_resources.environments import Environment, source_digest
from ft_resources.provenance import hardware

TRAINER = source_digest(
    "bento/conversation.py",
    "bento/devices.py",
    "bento/memory.py",
    "bento/packing.py",
    "bento/shapes.py",
    "ft_assets/training/engine",
)
"""Digest of the trainer's source: other training code makes another adapter."""
RUNNER = source_digest("ft_assets/training/plugins/running.py")
"""Digest of what runs a plug-in trainer and measures what it made."""


def environment_of_plugin(environment: Environment, packages: Mapping[str, str]) -> dict[str, str]:
    """Python, processor family and versions of the packages a plug-in trainer computes with; of a pod, its image."""
    if environment.compute == "kubernetes":
        return {"image": environment.image}
    return {**packages, "python": platform.python_version(), "machine": platform.machine()}


def environment_of_training(environment: Environment) -> dict[str, str]:
    """Library versions, device, processes, threads and processor family; of a pod, its image."""
    processes = {"processes": str(environment.processes)}
    if environment.compute == "kubernetes":
        return {"image": environment.image, "gpus": str(environment.gpus), **processes}
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "tokenizers")}
    return {
        **packages,
        **processes,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": expected_device(environment),
        "bf16": ",".join(hardware()["bf16_cpu"]),
        "threads": str(os.cpu_count()),
    }
