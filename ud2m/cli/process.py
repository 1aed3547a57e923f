"""What a command asks of its own process before PyTorch is loaded: how threads wait, and how memory is kept."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt``, from <malloc.h>."""


def prepare_process() -> None:
    """Let threads that wait sleep, and keep memory that was given back; what the environment says already, stays.

    Threads of OpenMP spin where they wait for one another, by default. Beside another process that has one of the cores
    a layer of a network then takes as long as the system lets the last thread wait for its core: ten times as long and
    more. Threads that sleep share the cores that are left (docs/results.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    keep_memory()


def keep_memory() -> None:
    """Let glibc keep all memory for the next tensor; other systems are left as they are.

    By default it gives every large tensor back to the system, which clears each page again for the next layer: a fifth
    of the time of large pictures. The process holds its peak until it ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
