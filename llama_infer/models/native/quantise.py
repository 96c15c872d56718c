"""Weights in 4 bits, in C++: some fifty operations a weight, for which torch would read and write its tensors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...native import function
from .integer import SPAN

_ARGUMENTS = (*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 2)


def quantise(weight: Tensor, group_size: int) -> dict[str, Tensor] | None:
    """The tensors that ``Int4`` writes for float32 [n, in]; None where there is no compiler.

    NaN and infinity make the scales of their spans NaN.
    """
    run = function("models/native/quantise", f"int4_{group_size}", _ARGUMENTS, exact=True)
    if run is None or not weight.is_cpu:
        return None
    rows, width = weight.shape
    if weight.dtype != torch.float32 or width % group_size:
        raise ValueError(f"groups of {group_size} of {weight.dtype} {rows} x {width} cannot be quantised")
    weight = weight.contiguous()
    numbers = torch.empty(rows, width // 2, dtype=torch.uint8)
    groups = torch.empty(rows, width // group_size, dtype=torch.uint8)
    scale = torch.empty(rows, -(-width // SPAN), dtype=torch.bfloat16)
    run(weight.data_ptr(), numbers.data_ptr(), groups.data_ptr(), scale.data_ptr(), rows, width)
    return {"int4": numbers, "groups": groups, "scale": scale}
