"""The likeliest tokens of each row, on which the end of a chain can be computed instead of on the whole vocabulary.

A truncation keeps few of 128 thousand tokens. One pass finds the likeliest; parts that can (``narrow``) work on those
and say in which rows the window was too small to know; those rows are done again in full. Both ways give the same
choice, because noise belongs to the token id and sums run from the likeliest token down.

A window is used on the CPU only, and is an array of numpy: at a few hundred numbers an operation is all overhead, of
which a tensor has five times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from .batch import Batch

Array: TypeAlias = NDArray[Any]

_CHUNKS = (64, 32, 16)
"""How many tokens may share a maximum in the first stage of the search; powers of two."""
_NO_ID = np.iinfo(np.int64).max


class Candidates(NamedTuple):
    """A window on the likeliest tokens of each row.

    Attributes:
        values: [R, K] scores, descending; -inf where a part removed a token.
        ids: int64 [R, K].
        everything: gives the scores of all tokens, a tensor [R, V], as they would be without the window; truncations
            that ``complete`` knows of left out. Costs a pass.
        complete: bool [R, 1]; true where no token outside of the window is left.
        fits: bool [R, 1]; false where a part needed tokens outside of the window.
        whole: the window is the vocabulary.
    """

    values: Array
    ids: Array
    everything: Callable[[], Tensor]
    complete: Array
    fits: Array
    whole: bool = False

    @staticmethod
    def of(logits: Tensor, count: int) -> Candidates:
        """The ``count`` likeliest tokens of each row of [R, V], on the CPU."""
        values, ids = _likeliest(logits, count)
        whole = values.shape[1] == logits.shape[1]
        every_row = np.ones((len(values), 1), dtype=np.bool_)
        return Candidates(
            values, ids, lambda: logits, every_row if whole else values[:, -1:] == -np.inf, every_row, whole
        )

    def tensor(self) -> Tensor:
        """The values as a tensor, for what is written once for windows and whole rows; not to be written to."""
        return torch.from_numpy(self.values)

    def keep(self, kept: Array, decided: Array) -> Candidates:
        """Without the tokens where ``kept`` [R, K] is false.

        ``decided`` bool [R, 1]: the part removed everything outside of the window in these rows, and knows it.
        """
        return self._replace(values=np.where(kept, self.values, -np.inf), complete=self.complete | decided)

    def need(self, enough: Array) -> Candidates:
        """Rows where ``enough`` bool [R, 1] is false must be done in full, unless nothing is left outside anyway."""
        return self._replace(fits=self.fits & (enough | self.complete))

    def cut(self, limit: Array, enough: Array | None = None) -> Candidates:
        """Without the tokens below ``limit`` [R, 1]; NaN stays, to be found.

        The window reaches far enough where something in it goes: then everything behind it goes too. ``enough`` bool
        [R, 1]: rows in which it does anyway, such as those of limit -inf.
        """
        below = self.values < limit
        complete = self.complete | below[:, -1:]
        fits = self.fits & (complete if enough is None else complete | enough)
        values = np.where(below, -np.inf, self.values)
        return Candidates(values, self.ids, self.everything, complete, fits, self.whole)

    def index_of_best(self, scores: Array) -> Array:
        """int64 [R]: where in the window the largest of ``scores`` [R, K] is; the lowest token id among equals."""
        best = scores == scores.max(-1, keepdims=True)
        return np.where(best, self.ids, _NO_ID).argmin(-1)  # type: ignore[no-any-return]


def column(batch: Batch, name: str) -> Array:
    """A parameter as an array [R, 1]."""
    return batch[name].numpy()[:, None]


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
    if logits.device.type != "cpu":
        best = logits.topk(min(count, logits.shape[1]))
        return best.values, best.indices
    values, ids = _likeliest(logits, count)
    return torch.from_numpy(values), torch.from_numpy(ids)


def _likeliest(logits: Tensor, count: int) -> tuple[Array, Array]:
    """The same on the CPU, in two stages where that is faster: the best tokens are in the chunks of the best maxima."""
    rows, vocab_size = logits.shape
    count = min(count, vocab_size)
    size = next((size for size in _CHUNKS if count * size * 8 <= vocab_size and vocab_size % size == 0), 0)
    if not size:
        best = logits.topk(count)
        return best.values.numpy(), best.indices.numpy()
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
    return values, ids


@lru_cache(maxsize=64)
def _row_numbers(rows: int) -> Tensor:
    return torch.arange(rows)
