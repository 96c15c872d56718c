"""Passes over whole rows of logits: the largest, with noise or without, the likeliest ones, the logarithm of the sum.

On the CPU these are most of what a step costs beside the model. ``rows.cpp`` does each in one pass a row; what serves
without a compiler is beside it.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .native import library

_CHUNKS = (64, 32, 16)
"""How many tokens may share a maximum in the first stage of the search; powers of two."""
_SMALL = 1e-20
_ROOM = 16
"""More than logits and noise that are not made for it leave in doubt."""


def argmax(logits: Tensor) -> Tensor:
    """``logits.argmax(-1)`` of [R, V], the first among equals, NaN before all else; for many rows on the CPU in two
    stages, where torch finds the largest of a chunk five times faster than its place."""
    rows, vocab_size = logits.shape
    size = _CHUNKS[0]
    if logits.device.type != "cpu" or logits.dtype not in (torch.float32, torch.float64):
        return logits.argmax(-1)
    if rows == 1 or vocab_size % size or vocab_size < size * size:
        return torch.from_numpy(logits.numpy().argmax(-1))
    grouped = logits.reshape(rows, -1, size)
    chunk = grouped.amax(-1).argmax(-1)
    return chunk * size + grouped[_row_numbers(rows), chunk].argmax(-1)


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``logits.topk(count)`` of [R, V]: values and ids, NaN before all else; which of equals at the end is open."""
    rows, vocab_size = logits.shape
    count = min(count, vocab_size)
    run = _kernels().get(logits.dtype)
    if run is None or not logits.is_cpu or not logits.is_contiguous() or not 0 < count * _CHUNKS[0] <= vocab_size:
        return _likeliest(logits, count)
    values = torch.empty((rows, count), dtype=logits.dtype)
    ids = torch.empty((rows, count), dtype=torch.int64)
    run(logits.data_ptr(), rows, vocab_size, count, values.data_ptr(), ids.data_ptr())
    return values, ids


def contenders(logits: Tensor, keys: NDArray[np.uint64]) -> NDArray[np.int64] | None:
    """Ids [R, _ROOM], some repeated, among which the largest of logits [R, V] plus the Gumbel noise of the streams
    ``keys`` [R] is. A row of -1 where it may be elsewhere; None without the kernel."""
    run = _kernels().get("contenders")
    if run is None or not _is_plain(logits):
        return None
    ids = np.empty((len(keys), _ROOM), dtype=np.int64)
    run(logits.data_ptr(), *logits.shape, _ROOM, keys.ctypes.data, ids.ctypes.data)
    return ids


def log_total(logits: Tensor) -> Tensor:
    """``logits.logsumexp(-1)`` of [R, V]. On the CPU in one pass a row, without the one for its largest logit, where a
    sum that is neither large nor small shows that nothing was lost by that."""
    if not logits.is_cpu or logits.dtype != torch.float32:
        return logits.logsumexp(-1)
    sums = torch.empty(logits.shape[0])
    if logits.is_contiguous() and "totals" in _kernels():
        _kernels()["totals"](logits.data_ptr(), *logits.shape, sums.data_ptr())
    else:
        weights = torch.empty(logits.shape[1])  # stays in the processor's cache
        for row, given in enumerate(logits):
            sums[row] = torch.exp(given, out=weights).sum()
    return _log(sums, logits)


def weights(logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """Of each row [R, V]: the largest logit, float32 [R], and float64 [R, 2] with x = logit - largest the sums of
    ``exp(x)`` and of ``x * exp(x)``; where the largest is not finite, that of ``exp(logit)`` twice. None without the
    kernel."""
    return _moments("weights", logits, 2)


def spreads(logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """Of each row [R, V]: the largest logit, float32 [R], and the (population) standard deviation of the finite ones,
    float64 [R, 1], NaN where the largest is not finite. None without the kernel."""
    return _moments("spreads", logits, 1)


def _moments(name: str, logits: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    run = _kernels().get(name)
    if run is None or not _is_plain(logits):
        return None
    largest, found = torch.empty(len(logits)), torch.empty((len(logits), count), dtype=torch.float64)
    run(logits.data_ptr(), *logits.shape, largest.data_ptr(), found.data_ptr())
    return largest, found


def widened(logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """The logits [M, V] in float32 (float64 stays), and their :func:`log_total` where it comes in the same pass."""
    if logits.dtype != torch.bfloat16 or not logits.is_cpu or not logits.is_contiguous() or "widen" not in _kernels():
        return logits if logits.dtype == torch.float64 else logits.float(), None
    wide, sums = torch.empty(logits.shape, dtype=torch.float32), torch.empty(logits.shape[0])
    _kernels()["widen"](logits.data_ptr(), *logits.shape, sums.data_ptr(), wide.data_ptr())
    return wide, _log(sums, wide)


def _log(sums: Tensor, logits: Tensor) -> Tensor:
    """Of the rows' sums, where these tell that nothing was lost."""
    safe = bool(((sums > _SMALL) & (sums < 1 / _SMALL)).all())
    return sums.log_() if safe else logits.logsumexp(-1)


def _likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """By ``topk``, or on the CPU in two stages where that is faster: the best are in the chunks of the best maxima."""
    rows, vocab_size = logits.shape
    size = next((size for size in _CHUNKS if count * size * 8 <= vocab_size and vocab_size % size == 0), 0)
    if not size or not logits.is_cpu:
        best = logits.topk(count)
        return best.values, best.indices
    chunks = logits.reshape(rows, -1, size)
    maxima, grouped, shift = chunks.amax(-1).numpy(), chunks.numpy(), size.bit_length() - 1
    first = maxima.shape[1] - count
    values = np.empty((rows, count), dtype=grouped.dtype)
    ids = np.empty((rows, count), dtype=np.int64)
    for row in range(rows):
        chosen = maxima[row].argpartition(first)[first:]  # the least of them first
        inside = grouped[row].take(chosen, axis=0).ravel()
        places = (~(inside < maxima[row, chosen[0]])).nonzero()[0]  # at least the maxima themselves, and NaN
        found = inside[places]
        order = found.argsort()[: -count - 1 : -1]
        values[row], places = found[order], places[order]
        ids[row] = (chosen[places >> shift] << shift) + (places & size - 1)
    return torch.from_numpy(values), torch.from_numpy(ids)


def _is_plain(logits: Tensor) -> bool:
    return logits.dtype == torch.float32 and logits.is_cpu and logits.is_contiguous()


def _kernels() -> dict[Any, Any]:
    """``likeliest`` by dtype, the others by name; empty where they cannot be had."""
    return _prepared(library("rows"))


@cache
def _prepared(compiled: Any) -> dict[Any, Any]:
    if compiled is None:
        return {}
    kernels = {
        torch.float32: (compiled.likeliest_float, 3, 2),
        torch.float64: (compiled.likeliest_double, 3, 2),
        "totals": (compiled.totals, 2, 1),
        "widen": (compiled.widen, 2, 2),
        "weights": (compiled.weights, 2, 2),
        "spreads": (compiled.spreads, 2, 2),
        "contenders": (compiled.contenders, 3, 2),
    }
    for run, numbers, addresses in kernels.values():
        run.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * numbers, *[ctypes.c_void_p] * addresses]
        run.restype = None
    return {name: run for name, (run, *_) in kernels.items()}


@lru_cache(maxsize=64)
def _row_numbers(rows: int) -> Tensor:
    return torch.arange(rows)
