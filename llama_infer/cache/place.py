"""New tokens into the slots where they belong: torch's indexing takes several times as long as the copying."""

from __future__ import annotations

import ctypes

from torch import Tensor

from ..native import function

_ARGUMENTS = (*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 7)


def place(buffer: Tensor, slots: Tensor, positions: Tensor, states: Tensor) -> None:
    """``buffer[slots, :, positions] = states``: a token each of states [N, heads, n] to a slot, int64 [N], and a
    position, int64 [N], of buffer [slots, heads, capacity, n]."""
    kernel = function("cache/place", "place", _ARGUMENTS) if buffer.is_cpu else None
    inside = buffer.stride(2) == buffer.shape[3] == states.shape[2] and states.stride(2) == buffer.stride(3) == 1
    if kernel is None or not inside or states.dtype != buffer.dtype:
        buffer[slots, :, positions] = states
        return
    size = buffer.element_size()
    kernel(
        *(states.data_ptr(), buffer.data_ptr(), slots.data_ptr(), positions.data_ptr()),
        *(states.shape[0], states.shape[1], size * states.shape[2]),
        *(size * states.stride(0), size * states.stride(1), size * buffer.stride(0), size * buffer.stride(1)),
    )
