"""Keys and values in 8 bits, a scale for each token and head: half the memory of bfloat16, half of what a step reads.

On the CPU our attention reads them as they are held. Where there is no kernel of ours they become what they were, on
the CPU for the rows that a call of attention serves, on other devices all at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from ..encoded import Encoded
from ..native import function
from .slots import SlotCache, SlotLayer

_TYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_ARGUMENTS = (*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 5)


class Int8SlotCache(SlotCache):
    """The slot cache, rounded to 8 bits: every key and value vector to 255 steps of its own greatest number.

    Needs (head_dim + 2) / (2 * head_dim) of the memory that bfloat16 does. Results differ slightly from the exact
    cache's; they depend on nothing but the request, as always.
    """

    def _layer(self) -> SlotLayer:
        make: Callable[[], SlotLayer] = _Int8Layer
        return make()


class _Int8Layer(SlotLayer):
    def encode(self, states: Tensor) -> tuple[Tensor, ...]:
        return encode(states)

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        found = Encoded(*stored)
        return found if found.is_cpu else found.decode()  # elsewhere nobody reads 8 bits


def encode(states: Tensor) -> tuple[Tensor, Tensor]:
    """[N, heads, d] -> steps, int8 [N, heads, d], and a scale [N, heads, 1]. What is not finite makes its scale so."""
    taken = states.is_cpu and states.dtype in _TYPES and states.stride(2) == 1
    run = function("cache/int8", _TYPES[states.dtype], _ARGUMENTS, exact=True) if taken else None
    if run is None:
        return encode_plainly(states)
    steps = torch.empty(states.shape, dtype=torch.int8)
    scale = states.new_empty(*states.shape[:2], 1)
    run(states.data_ptr(), steps.data_ptr(), scale.data_ptr(), *states.shape, *states.stride()[:2])
    return steps, scale


def encode_plainly(states: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in torch's operations: for any type and device, and what the kernel is held against."""
    scale = states.abs().amax(-1, keepdim=True) / 127
    steps = states.float() / scale.float().clamp(min=torch.finfo(torch.float32).tiny)
    return steps.round().clamp(-127, 127).to(torch.int8), scale
