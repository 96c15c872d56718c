"""Linear layers with weights of 8 or 4 bits and activations of 8, quantised in the same call, on the CPU.

A token's result is the same to the last bit alone and in any batch: what is summed up are integers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ...native import function
from ..mapped import large_pages

SPAN, PART = 256, 128
"""Inputs that share a scale, of an output's weights and of a token's activations; those whose weights lie together."""
_BLOCK, _QUAD = 64, 16
_AT_A_TIME = 8
"""Blocks that are packed at a time: they stay in the processor's cache."""

_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_TYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_ARGUMENTS = (*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3)


def kernel(name: str, dtype: torch.dtype) -> Callable[..., int] | None:
    """The kernel for weights "int8", "int4_32", "int4_64" or "int4_128"; None where there is none."""
    symbol = f"{name}_{_TYPES.get(dtype)}"
    found: Callable[..., int] | None = function("models/native/integer", symbol, _ARGUMENTS, ctypes.c_int)
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
    if not run(x.data_ptr(), packed.data_ptr(), added, y.data_ptr(), x.numel() // width, width, outputs):
        raise torch.OutOfMemoryError(f"no memory to quantise {x.numel() // width} rows of {width} activations")
    return y


Part: TypeAlias = tuple[torch.dtype, int, int]
"""Of tensors with a row for each output: their dtype, columns a record, and how many neighbours stay together."""
_SCALE: Part = (torch.bfloat16, 1, 1)


def pack(tensors: Sequence[Tensor], scale: Tensor, parts: Sequence[Part], width: int) -> Tensor:
    """[out, columns] each, scale [out, spans] -> uint8 [blocks, records, bytes]. What the last ones lack is 0."""
    rows, records = len(scale), -(-width // PART)
    parts, sizes = (*parts, _SCALE), _sizes(parts)
    tensors = (*tensors, scale.repeat_interleave(SPAN // PART, 1)[:, :records])
    packed = torch.empty(-(-rows // _BLOCK), records, sum(sizes), dtype=torch.uint8)
    large_pages(packed)
    for start in range(0, len(packed), _AT_A_TIME):
        blocks = packed[start : start + _AT_A_TIME]
        for tensor, (dtype, columns, together), into in zip(tensors, parts, blocks.split(sizes, -1), strict=True):
            some = tensor[start * _BLOCK : (start + _AT_A_TIME) * _BLOCK]
            missing = (0, records * columns - some.shape[1], 0, len(blocks) * _BLOCK - len(some))
            lanes = F.pad(some, missing).contiguous().view(_UNITS[dtype.itemsize * together])
            lanes = lanes.view(len(blocks), -1, _QUAD, records, columns // together).permute(0, 3, 1, 4, 2)
            into.copy_(lanes.contiguous().view(torch.uint8).view_as(into))
    return packed


def unpack(packed: Tensor, parts: Sequence[Part], rows: int, width: int) -> list[Tensor]:
    """What was packed, for so many inputs, the scale last."""
    blocks, records, _ = packed.shape
    found = []
    for (dtype, columns, together), record in zip((*parts, _SCALE), packed.split(_sizes(parts), -1), strict=True):
        tensor = torch.empty(rows, -(-width * columns // PART), dtype=dtype)
        for start in range(0, blocks, _AT_A_TIME):
            some, into = record[start : start + _AT_A_TIME], tensor[start * _BLOCK : (start + _AT_A_TIME) * _BLOCK]
            lanes = some.contiguous().view(_UNITS[dtype.itemsize * together])
            lanes = lanes.view(len(some), records, -1, columns // together, _QUAD).permute(0, 2, 4, 1, 3)
            into.copy_(lanes.flatten(3).flatten(0, 2).view(dtype)[: len(into), : into.shape[1]])
        found.append(tensor)
    found[-1] = found[-1][:, :: SPAN // PART].contiguous()
    return found


def _sizes(parts: Sequence[Part]) -> list[int]:
    """Bytes of each in a record, the scale's last."""
    return [_BLOCK * columns * dtype.itemsize for dtype, columns, _ in (*parts, _SCALE)]
