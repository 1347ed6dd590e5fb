"""What besides rows and settings decides the bytes of an adapter."""

import os
import platform
from importlib.metadata import version

from ft_resources.environments import Environment, source_digest

TRAINER = source_digest("ft_assets/training/trainer.py", "ft_assets/training/batching.py")
"""Digest of the trainer's source: other training code makes another adapter."""


def environment_of_training(environment: Environment) -> dict[str, str]:
    """Library versions, device, threads and processor family; of a pod, its image."""
    if environment.compute == "kubernetes":
        return {"image": environment.image, "gpus": str(environment.gpus)}
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "tokenizers")}
    return {
        **packages,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": environment.device,
        "threads": str(os.cpu_count()),
    }
