"""What a training ran on: commit of the code, versions of the packages that decide its outcome, and the hardware.

Torch is asked only where it is loaded already, so that every process may import and call this.
"""

import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ft_resources.environments import REPOSITORY
from ft_resources.usage import memory_limit, usable_cores

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy", "accelerate", "safetensors")


def provenance() -> dict[str, Any]:
    """Code, packages and hardware of this process, ready for JSON.

    Returns:
        `code` (`commit`, `dirty`; both None outside a git checkout), `packages` (name to version, None when it is not
        installed), `hardware` (`cpu`, `cores` and `memory_bytes` that this process may use, `bf16_cpu` and `int8_cpu`:
        instruction sets for them, `gpus`, `bf16_gpu`) and `system`. `gpus` and `bf16_gpu` are None where torch is not
        loaded.
    """
    return {
        "code": code(),
        "packages": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hardware": hardware(),
        "system": platform.platform(),
    }


def hardware() -> dict[str, Any]:
    """The processor, memory and GPUs that this process may use; see `provenance`."""
    return {**_cpu(), **_gpus()}


def code(folder: Path = REPOSITORY) -> dict[str, Any]:
    """The commit that `folder` is checked out at, and whether a tracked file differs from it."""
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *words: str) -> str | None:
    if not (folder / ".git").exists():  # a checkout further up is not this code's
        return None
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set[str]()
    description = Path("/proc/cpuinfo")
    if description.exists():
        for line in description.read_text().split("\n\n", maxsplit=1)[0].splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                model = value
            elif key in ("flags", "Features"):
                flags = set(value.split())
    return {
        "cpu": model,
        "cores": usable_cores(),
        "memory_bytes": memory_limit(),
        "bf16_cpu": sorted(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}),
        "int8_cpu": sorted(flags & {"avx512_vnni", "avx_vnni", "amx_int8"}),
    }


def _gpus() -> dict[str, Any]:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return {"gpus": None, "bf16_gpu": None}
    if not torch.cuda.is_available():
        return {"gpus": [], "bf16_gpu": False}
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"gpus": names, "bf16_gpu": bool(torch.cuda.is_bf16_supported(including_emulation=False))}
