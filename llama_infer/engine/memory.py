"""Running out of memory: how it is told from other errors, and what is given back at once."""

from __future__ import annotations

import gc

import torch

_CPU_MESSAGES = ("defaultcpuallocator", "can't allocate memory", "not enough memory", "cannot allocate memory")


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
