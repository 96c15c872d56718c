"""Linear layers of few rows in bfloat16, on weights as oneDNN packs them.

Few rows cost the reading of the weights. oneDNN reads them at a half to nine tenths of the memory's speed, and a call
of it takes longer than a small layer. Ours reads the same memory: nothing is held twice.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...native import library

_ROWS = 32
"""More rows are oneDNN's."""


@dataclass(frozen=True)
class Packing:
    """How a packed weight [out, in] lies: [out / ``outputs``][``inputs`` / 2][``outputs``][2], with zeros behind the
    ends."""

    outputs: int
    inputs: int


class _Layer(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("out", "in", "block", "inputs")),
    )


class Kernel:
    """One layer's. A row's result is the same, bit for bit, whatever other rows are in the call.

    Args:
        weight: the address of the packed weight, which the caller keeps alive.
        shape: of the weight, (out, in).
        packing: how it lies.
        bias: bfloat16 [out].
    """

    def __init__(self, weight: int, shape: tuple[int, int], packing: Packing, bias: Tensor | None = None) -> None:
        self._out, self._in = shape
        self._bias = None if bias is None else bias.detach().clone()  # held, because its address is
        at = None if self._bias is None else self._bias.data_ptr()
        self._layer = _Layer(weight, at, *shape, packing.outputs, packing.inputs)
        self._address = ctypes.addressof(self._layer)
        self._run = _kernels().linear
        self._most = _ROWS * self._in

    def __call__(self, x: Tensor) -> Tensor | None:
        """bfloat16 [..., in] -> [..., out]; None where it would not pay, or is not for this kernel."""
        size = x.numel()
        if not 0 < size <= self._most or x.shape[-1] != self._in or x.dtype != torch.bfloat16 or not x.is_cpu:
            return None
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self._out))
        return y if self._run(self._address, x.data_ptr(), y.data_ptr(), size // self._in) else None


def kernel(weight: int, shape: tuple[int, int], packing: Packing, bias: Tensor | None) -> Kernel | None:
    """The kernel for a layer; None where it cannot be had, or the weight lies in a way that it does not read."""
    if packing.outputs not in (16, 32, 48, 64) or _kernels() is None:
        return None
    if bias is not None and (bias.dtype != torch.bfloat16 or not bias.is_cpu):
        return None
    return Kernel(weight, shape, packing, bias)


@functools.cache
def _kernels() -> Any:
    kernels = library("models/native/linear")
    if kernels is not None:
        kernels.linear.argtypes = (*[ctypes.c_void_p] * 3, ctypes.c_int64)
        kernels.linear.restype = ctypes.c_bool
    return kernels
