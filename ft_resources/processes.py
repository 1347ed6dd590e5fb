"""Processes of this machine, told from later ones of the same number."""

import psutil

CLOCK_ERROR = 2.0
"""Seconds by which the start of a process may seem to move when the clock is set."""


def find(pid: int, started: float) -> psutil.Process | None:
    """The process that has this number and began then (seconds since the epoch); None when it has ended."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < CLOCK_ERROR
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def end(process: psutil.Process, seconds: float = 20.0) -> None:
    """Tell a process to end with SIGTERM, and wait; whatever it or its children still do after `seconds` is killed."""
    try:
        family = process.children(recursive=True)
        process.terminate()
    except psutil.NoSuchProcess:
        return
    psutil.wait_procs([process], timeout=seconds)
    _, alive = psutil.wait_procs(family, timeout=5)
    for one in (process, *alive):
        if one.is_running():
            one.kill()
    psutil.wait_procs([process, *alive], timeout=5)
