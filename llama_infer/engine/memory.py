"""Running out of memory: how it is told from other errors; what is given back to the system, and what is kept."""

from __future__ import annotations

import ctypes
import gc
import os
import sys

import torch

_CPU_MESSAGES = ("defaultcpuallocator", "can't allocate memory", "not enough memory", "cannot allocate memory")

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 256 << 20
_LARGE = 64 << 20  # what is larger, such as keys and values, is given back as before


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, on whatever device and in whichever class that is said."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _CPU_MESSAGES)


def give_back(device: torch.device) -> None:
    """Returns what is no longer used to the device, so that it can be had in larger pieces."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next one, which asks for the same.

    By default it gives megabytes back to the system at once, and getting them anew, page by page, takes as long as the
    arithmetic on them: half of what 32 rows of 128,256 logits cost. Nothing happens elsewhere, nor where the
    environment says how malloc should behave. What is kept is bounded by :data:`_KEPT`.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_THRESHOLD, _LARGE)
        mallopt(_TRIM_THRESHOLD, _KEPT)
