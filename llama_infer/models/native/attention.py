"""Attention on the CPU: of single new tokens, and where the processor multiplies tiles (AMX) of any number.

torch's fused kernel pads rows of unequal length, and with one query a row it reads keys and values at a fraction of the
memory's speed; with many, it computes at a fraction of the processor's. Rows of any lengths are one call here. Keys and
values in 8 bits are read as they are held.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...encoded import Encoded
from ...layout import Layout
from ...native import function
from . import tiled

_TYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_DIMS = (8, 16, 32, 64, 96, 128, 256)
_TILED = (32, 64, 96, 128, 256)
_ANY, _DECODE, _PREFILL = (f"models/native/{name}" for name in ("attention", "decode", "prefill"))
_ONE = (*[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 6, ctypes.c_float)
_MANY = (*[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 7, ctypes.c_float)


def kernel(query: Tensor, key: Tensor, value: Tensor) -> Callable[..., None] | None:
    """The kernel for keys and values [rows, kv heads, width, d] as they lie in the cache; None where there is none."""
    if not key.is_cpu or query.dtype != key.dtype or value.dtype != key.dtype:
        return None
    if key.shape != value.shape or key.stride() != value.stride() or key.stride()[2:] != (key.shape[3], 1):
        return None
    if key.dtype not in _TYPES or key.shape[3] not in _DIMS:
        return None
    if type(key) is not type(value) or not all(_in_step(t) for t in (key, value)):
        return None
    by_tiles = key.dtype == torch.bfloat16 and key.shape[3] in _TILED and tiled.available()
    place = (_DECODE if by_tiles else _ANY) + ("_int8" if isinstance(key, Encoded) else "")
    run: Callable[..., None] | None = function(place, f"{_TYPES[key.dtype]}_{key.shape[3]}", _ONE)
    return run


def attend(
    run: Callable[..., None],
    q: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    layout: Layout,
    window: int | None,
    scaling: float | None,
) -> None:
    """Fills ``out`` [N, heads, d] for the rows that feed one token, from q [N, heads, d]."""
    where = layout.singles
    if where is None:
        return
    q = q.contiguous()
    heads, dim = key.shape[1], key.shape[3]
    run(
        *(q.data_ptr(), *_addresses(key, value), out.data_ptr(), where.data_ptr()),
        *(where.shape[1], heads, q.shape[1] // heads, key.stride(0), key.stride(1)),
        layout.width if window is None else window,
        dim**-0.5 if scaling is None else scaling,
    )


def prefills(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> bool:
    """Whether :func:`prefill` can be used for such tensors. It takes maxima before it scales, so by what is above 0."""
    return (
        (scaling is None or scaling > 0)
        and key.dtype == torch.bfloat16
        and key.shape[3] in _TILED
        and query.shape[1] // key.shape[1] <= 512
        and kernel(query, key, value) is not None
        and _prefill() is not None
    )


def prefill(
    q: Tensor, key: Tensor, value: Tensor, out: Tensor, layout: Layout, window: int | None, scaling: float | None
) -> None:
    """Fills ``out`` [N, heads, d] for the rows that feed several tokens, from q [N, heads, d]. A token's result is the
    same, bit for bit, whatever else is fed. Raises MemoryError."""
    where = layout.several
    if where is None:
        return
    q = q.contiguous()
    heads, dim = key.shape[1], key.shape[3]
    done = _prefill()(
        *(q.data_ptr(), *_addresses(key, value), out.data_ptr(), where.data_ptr()),
        *(where.shape[1], heads, q.shape[1] // heads, dim, key.stride(0), key.stride(1)),
        layout.width if window is None else window,
        dim**-0.5 if scaling is None else scaling,
    )
    if not done:
        raise MemoryError("there is no memory for the attention of a prompt: feed fewer tokens at once")


def _in_step(t: Tensor) -> bool:
    """Whether scales, if there are any, lie as the numbers do: one where those have a token's."""
    if not isinstance(t, Encoded):
        return True
    by_token = tuple(step // t.shape[3] for step in t.stride()[:3])
    return t.scale.stride()[:3] == by_token and all(step % t.shape[3] == 0 for step in t.stride()[:3])


def _addresses(key: Tensor, value: Tensor) -> tuple[int | None, ...]:
    """Of keys, values, and the scales of both, where they have some."""
    if isinstance(key, Encoded) and isinstance(value, Encoded):
        return tuple(t.data_ptr() for t in (key.steps, value.steps, key.scale, value.scale))
    return key.data_ptr(), value.data_ptr(), None, None


def _prefill() -> Any:
    return function(_PREFILL, "prefill", _MANY, ctypes.c_bool) if tiled.available() else None
