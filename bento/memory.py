"""Memory of a process that computes."""

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8
"""Numbers of these parameters in glibc's malloc.h; 32 MB is the most it takes for the first."""


def keep_memory() -> None:
    """Let freed memory stay with this process, where glibc manages it. To be called before threads are started.

    By default every large result is mapped anew and given back, and the kernel clears its pages each time, which can
    take longer than computing what is written there. Threads other than the first would have regions of 64 MB of
    their own, which are given back whenever they are empty.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_MMAP_THRESHOLD, 32 << 20)
    mallopt(_TRIM_THRESHOLD, 512 << 20)
    mallopt(_ARENA_MAX, 1)
