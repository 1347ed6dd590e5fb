"""What besides rows and settings decides the bytes of an adapter."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path


def _source_digest() -> str:
    folder = Path(__file__).parent
    total = hashlib.sha256()
    for name in ("trainer.py", "batching.py"):
        total.update((folder / name).read_bytes())
    return total.hexdigest()[:12]


TRAINER = _source_digest()
"""Digest of the trainer's source: other training code makes another adapter."""


def environment_of_training() -> dict[str, str]:
    """Library versions, threads and processor family."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "tokenizers")}
    return {
        **packages,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(os.cpu_count()),
    }
