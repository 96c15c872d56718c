"""Linear layers with weights of 8 or 4 bits and activations of 8, quantised in the same call, on the CPU.

A token's result is the same to the last bit alone and in any batch: what is summed up are integers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .build import library

SPAN = 128
"""Inputs that share a scale, of an output's weights and of a token's activations."""
BLOCK, _QUAD = 64, 16
_AT_A_TIME = 8
"""Blocks that are packed at a time: they stay in the processor's cache."""

_TYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def kernel(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """The kernel for weights "int8", "int4_32", "int4_64" or "int4_128"; None where there is none."""
    kernels = library("integer")
    found = None if kernels is None else getattr(kernels, f"{name}_{_TYPES.get(dtype)}", None)
    if found is not None and found.argtypes is None:
        found.argtypes, found.restype = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3, None
    return found


def linear(name: str, x: Tensor, packed: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """[..., in] -> [..., out] in the dtype of ``x``, by the kernel of that name; ``shape`` is (out, in)."""
    outputs, width = shape
    run = kernel(name, x.dtype)
    if run is None or x.shape[-1] != width or not x.is_cpu:
        raise ValueError(f"{name} weights of {outputs} x {width} take no {x.dtype} {tuple(x.shape)} on {x.device}")
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    bias = bias if bias is None else bias.to(x.dtype)
    added = bias if bias is None else bias.data_ptr()
    run(x.data_ptr(), packed.data_ptr(), added, y.data_ptr(), x.numel() // width, width, outputs)
    return y


def pack(parts: Sequence[Tensor], spans: int) -> Tensor:
    """Tensors with a row for each output and as many columns as spans, or a multiple -> uint8 [blocks, spans, bytes]."""
    rows = len(parts[0])
    sizes = [_bytes(part, spans) for part in parts]
    packed = torch.empty(-(-rows // BLOCK), spans, sum(sizes), dtype=torch.uint8)
    for start in range(0, len(packed), _AT_A_TIME):
        records = packed[start : start + _AT_A_TIME]
        for part, into in zip(parts, records.split(sizes, -1), strict=True):
            some = part[start * BLOCK : (start + _AT_A_TIME) * BLOCK]
            some = F.pad(some, (0, 0, 0, len(records) * BLOCK - len(some)))
            lanes = some.view(len(records), -1, _QUAD, spans, some.shape[1] // spans).permute(0, 3, 1, 4, 2)
            into.copy_(lanes.contiguous().view(torch.uint8).view_as(into))
    return packed


def unpack(packed: Tensor, like: Sequence[tuple[torch.dtype, int]], rows: int) -> list[Tensor]:
    """What was packed: tensors of those dtypes and so many columns a span."""
    spans = packed.shape[1]
    sizes = [BLOCK * columns * dtype.itemsize for dtype, columns in like]
    parts = []
    for (dtype, columns), record in zip(like, packed.split(sizes, -1), strict=True):
        part = torch.empty(len(packed) * BLOCK, spans * columns, dtype=dtype)
        for some, into in zip(record.split(_AT_A_TIME), part.split(_AT_A_TIME * BLOCK), strict=True):
            lanes = some.contiguous().view(dtype).view(len(some), spans, -1, columns, _QUAD)
            into.copy_(lanes.permute(0, 2, 4, 1, 3).reshape_as(into))
        parts.append(part[:rows])
    return parts


def _bytes(part: Tensor, spans: int) -> int:
    return BLOCK * part.shape[1] // spans * part.element_size()
