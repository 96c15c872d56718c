"""What lies between a model's products, in bfloat16 on the CPU: one pass of ours for several of torch's.

Each function is None-or-result: None where the tensors are not of the kind that it takes, and torch has to do it.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ...native import library

_ADDRESS, _COUNT = ctypes.c_void_p, ctypes.c_int64


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """x [..., n] over the root of its mean square, times weight [n] (Zhang and Sennrich 2019)."""
    if not _taken(x, weight) or weight.shape != x.shape[-1:]:
        return None
    y = torch.empty_like(x)
    size = weight.numel()
    _kernels().rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // size, size, eps)
    return y


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rotary position embedding of q and k [1, heads, N, d], views of [1, N, heads, d], by cos and sin [1, N, d]."""
    by_token = q.transpose(1, 2), k.transpose(1, 2)
    if not _taken(*by_token, cos, sin) or not (cos.shape == sin.shape == (1, q.shape[2], q.shape[3])):
        return None
    if q.shape[0] != 1 or k.shape[0] != 1 or k.shape[2:] != q.shape[2:] or q.shape[3] % 2:
        return None
    out = tuple(torch.empty_like(tensor) for tensor in by_token)
    addresses = (tensor.data_ptr() for tensor in (*by_token, cos, sin, *out))
    _kernels().rotate(*addresses, q.shape[2], q.shape[1], k.shape[1], q.shape[3])
    return out[0].transpose(1, 2), out[1].transpose(1, 2)


def gated(gate: Tensor, x: Tensor) -> Tensor | None:
    """SiLU of ``gate`` times ``x``, both of the same shape (SwiGLU, Shazeer 2020)."""
    if not _taken(gate, x) or gate.shape != x.shape:
        return None
    y = torch.empty_like(x)
    _kernels().gated(gate.data_ptr(), x.data_ptr(), y.data_ptr(), x.numel())
    return y


def available() -> bool:
    """Whether there are kernels at all."""
    return _kernels() is not None


def _taken(*tensors: Tensor) -> bool:
    return _kernels() is not None and all(
        tensor.dtype == torch.bfloat16 and tensor.is_cpu and tensor.is_contiguous() and tensor.numel() > 0
        for tensor in tensors
    )


@functools.cache
def _kernels() -> Any:
    kernels = library("models/native/elementwise")
    if kernels is not None:
        kernels.rms_norm.argtypes = (*[_ADDRESS] * 3, *[_COUNT] * 2, ctypes.c_float)
        kernels.rotate.argtypes = (*[_ADDRESS] * 6, *[_COUNT] * 4)
        kernels.gated.argtypes = (*[_ADDRESS] * 3, _COUNT)
    return kernels
