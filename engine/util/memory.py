"""Memory: out-of-memory errors with advice on what to lower, and memory that is given back."""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Any

from ..errors import OutOfMemory


class explained_memory:
    """Turns an out-of-memory error into one that says what to lower."""

    def __init__(self, what: str, lower: str) -> None:
        self.what, self.lower = what, lower

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import torch

        text = str(error).lower()
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            isinstance(error, RuntimeError)
            and ("not enough memory" in text or "can't allocate memory" in text)
        ):
            raise OutOfMemory(
                f"memory ran out in {self.what}: lower {self.lower}, or train adapters alone"
                f" (`lora` under `policy`). ({str(error).splitlines()[0]})"
            ) from error


LARGE = 2**19  # bytes of a block that is given back at once: activations of some hundred tokens
M_MMAP_THRESHOLD = -3  # of <malloc.h>


def give_back_freed() -> None:
    """Makes the C library give large blocks back to the system when they are freed, from now on.

    glibc would keep them, and before 2.38 it cannot use most of them again, since torch wants them
    aligned: a forward pass that keeps little then holds as much as one that keeps all. The price is
    that fresh memory must be cleared: a fifth more CPU time for SmolLM2-135M with passes of 440
    tokens, whose peak falls from 2.4 to 1.9 GB.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def resident() -> float:
    """Returns the bytes of memory that this process has."""
    import psutil

    return float(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Returns the most bytes of memory that this process has had."""
    import psutil

    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
