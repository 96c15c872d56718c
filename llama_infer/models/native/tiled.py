"""Linear layers in bfloat16 by the processor's tiles (AMX), on weights as they lie, in memory or in a mapped file.

A tile of weights, sixteen outputs of 32 inputs, is read from row-major weights as it is: it is the inputs that are laid
out anew, and they are few. So nothing is packed and nothing is held twice, and a model is there as soon as its file is
mapped. Where the processor has no tiles, ``linear.py`` and oneDNN serve.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ...native import function

_LEAST = 32
"""Inputs and outputs that there are at least, for whole tiles."""


def available() -> bool:
    """Whether the processor multiplies tiles, the system lets this process, and there is a compiler."""
    return _kernel() is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """[..., in], [out, in], [out] -> [..., out]; None where the kernel does not serve: not bfloat16 on the CPU, shapes
    that do not fit, memory that cannot be had. A row's result is the same, bit for bit, whatever other rows are in the
    call."""
    run, (out, width) = _kernel(), weight.shape
    given = (x, weight) if bias is None else (x, weight, bias)
    if run is None or not all(t.dtype == torch.bfloat16 and t.is_cpu for t in given):
        return None
    if x.shape[-1] != width or min(out, width) < _LEAST or not x.numel() or not weight.is_contiguous():
        return None
    if bias is not None and (bias.shape != (out,) or not bias.is_contiguous()):
        return None
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    added = None if bias is None else bias.data_ptr()
    done = run(weight.data_ptr(), added, x.data_ptr(), y.data_ptr(), x.numel() // width, out, width)
    return y if done else None


@functools.cache
def _kernel() -> Any:
    """None where there is no compiler or the processor has no tiles."""
    found = function("models/native/tiled", "available", (), ctypes.c_bool)
    if found is None or not found():
        return None
    return function("models/native/tiled", "linear", (*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3), ctypes.c_bool)
