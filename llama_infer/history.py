"""The scores of tokens that have occurred: changed, lent and put back by the history's length, not the vocabulary's.

Those places are scattered over the vocabulary, and reading one is a miss of the processor's caches. ``history.cpp``
asks for them ahead and does a row's changes one after another; torch's operators are the reference, to the bit, and
serve where there is no compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .parts import LogitsProcessor, Trait

if TYPE_CHECKING:
    from torch import Tensor

    from .batch import Batch

HISTORY_ONLY: frozenset[Trait] = frozenset({"row_independent", "history_only"})
"""The traits of a part that writes into the logits that it is given, at tokens of the history only."""
_KINDS = ("scale", "lower", "lower_each")


class Change(NamedTuple):
    """What happens to the scores of a row's tokens from its token number ``first`` on.

    Attributes:
        kind: "scale": divided by ``by`` where positive, multiplied where negative; "lower": less ``by``; "lower_each":
            less ``by`` for each time that the token occurs, where the others take it once.
        by: float [R].
        first: int64 [R]; None: all tokens count.
    """

    kind: Literal["scale", "lower", "lower_each"]
    by: Tensor
    first: Tensor | None = None


class HistoryPenalty:
    """A processor that is a :class:`Change`. Neighbours in a chain are applied in one call."""

    traits: frozenset[Trait] = HISTORY_ONLY

    def change(self, batch: Batch) -> Change:
        """What it does in these rows."""
        raise NotImplementedError

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        return apply(logits, batch, [self.change(batch)])


class _Together:
    """Neighbours in one call."""

    traits = HISTORY_ONLY

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        return apply(logits, batch, [part.change(batch) for part in self.parts])


def together(parts: Sequence[LogitsProcessor]) -> list[LogitsProcessor]:
    """The parts with neighbouring penalties as one; a subclass with a call of its own stays what it is."""
    found: list[LogitsProcessor] = []
    for joins, some in itertools.groupby(parts, lambda part: type(part).__call__ is HistoryPenalty.__call__):
        neighbours = list(some)
        found += [_Together(neighbours)] if joins and len(neighbours) > 1 else neighbours
    return found


def apply(logits: Tensor, batch: Batch, changes: Sequence[Change]) -> Tensor:
    """The logits [R, V] after the changes, in place."""
    if batch.width == 0:
        return logits
    changes = [
        Change(kind, by.to(logits.dtype).contiguous(), None if first is None else first.contiguous())
        for kind, by, first in changes
    ]
    kernels = _kernels(logits)
    if kernels is not None:
        listed = [_Change(_KINDS.index(kind), by.data_ptr(), _address(first)) for kind, by, first in changes]
        if kernels.change(*_rows(logits, batch), (_Change * len(listed))(*listed), len(listed)):
            return logits
    for change in changes:  # by torch, which names a token that the vocabulary does not have
        _apply_plainly(logits, batch, change)
    return logits


@contextlib.contextmanager
def restored(logits: Tensor, batch: Batch) -> Iterator[None]:
    """Whatever is written into the logits [R, V] at the tokens of the history is undone: that costs as much as the
    history is long, a copy as much as the vocabulary is large. On the CPU, for contiguous logits."""
    import torch

    kernels = _kernels(logits)
    if kernels is None:
        with _restored_plainly(logits, batch.tokens):
            yield
        return
    kept = torch.empty((len(batch), batch.width), dtype=logits.dtype)
    given = *_rows(logits, batch), kept.data_ptr(), batch.width
    if not kernels.keep(*given):
        raise IndexError(f"the history has tokens that a vocabulary of {logits.shape[1]} does not have")
    try:
        yield
    finally:
        kernels.restore(*given)


def _apply_plainly(logits: Tensor, batch: Batch, change: Change) -> None:
    """The definition, in torch's operators."""
    import torch

    kind, by, first = change
    first = torch.zeros_like(batch.length) if first is None else first
    at = torch.arange(batch.width, device=batch.device)[None]
    counted = (at >= first[:, None]) & (at < batch.length[:, None])
    if kind == "lower_each":
        logits.scatter_add_(1, batch.tokens.clamp(min=0), -by[:, None] * counted)
        return
    by = by.masked_fill(first >= batch.length, 1.0 if kind == "scale" else 0.0)[:, None]
    # The row's last token counts wherever any does: in place of those that do not, it repeats what is written anyway.
    last = batch.tokens.gather(1, (batch.length - 1).clamp(min=0)[:, None]).clamp(min=0)
    ids = batch.tokens.where(counted, last)
    scores = logits.gather(1, ids)
    # A token gives the same value at each of its occurrences, so their order does not matter.
    logits.scatter_(1, ids, (scores * by).where(scores < 0, scores / by) if kind == "scale" else scores - by)


@contextlib.contextmanager
def _restored_plainly(logits: Tensor, tokens: Tensor) -> Iterator[None]:
    import numpy as np

    values, (rows, vocab_size) = logits.numpy().reshape(-1), logits.shape
    # A filling of -1 is the last logit of the row before, which is put back like any other.
    places = (tokens.numpy() + np.arange(0, rows * vocab_size, vocab_size)[:, None]).ravel()
    before = values.take(places)
    try:
        yield
    finally:
        values[places] = before


class _Change(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int64), ("by", ctypes.c_void_p), ("first", ctypes.c_void_p))


class _Kernels(NamedTuple):
    change: Any
    keep: Any
    restore: Any


def _rows(logits: Tensor, batch: Batch) -> tuple[int, ...]:
    """What each kernel begins with."""
    tokens = batch.history.values
    return logits.data_ptr(), *logits.shape, tokens.stride(0), tokens.data_ptr(), batch.length.data_ptr()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _kernels(logits: Tensor) -> _Kernels | None:
    """For such logits; None where there are none."""
    return _compiled().get(logits.dtype) if logits.is_cpu and logits.is_contiguous() else None


def _compiled() -> dict[Any, _Kernels]:
    from .native import library

    return _prepared(library("history"))


@cache
def _prepared(kernels: Any) -> dict[Any, _Kernels]:
    import torch

    if kernels is None:
        return {}
    found = {}
    for name, dtype in {"float": torch.float32, "double": torch.float64}.items():
        found[dtype] = _Kernels(*(getattr(kernels, f"{kernel}_{name}") for kernel in _Kernels._fields))
        for run in found[dtype]:
            addresses, counts = [ctypes.c_void_p] * 3, [ctypes.c_int64] * 4
            run.argtypes = [ctypes.c_void_p, *counts[:3], *addresses, counts[3]]
            run.restype = ctypes.c_bool
    return found
