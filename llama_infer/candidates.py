"""The likeliest tokens of each row, on which the end of a chain can be computed instead of on the whole vocabulary.

A truncation keeps few of 128 thousand tokens. One pass finds the likeliest; parts that can (``narrow``) work on those
and say in which rows the window was too small to know; those rows are done again in full. Both ways give the same
choice, because noise belongs to the token id and sums run from the likeliest token down.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNKS = (64, 32, 16)
"""How many tokens may share a maximum in the first stage of the search."""


class Candidates(NamedTuple):
    """A window on the likeliest tokens of each row.

    Attributes:
        values: [R, K] scores, descending; -inf where a part removed a token.
        ids: int64 [R, K].
        everything: gives the scores of all tokens [R, V], as they would be without the window; truncations that
            ``complete`` knows of left out. Costs a pass.
        complete: bool [R, 1]; true where no token outside of the window is left.
        fits: bool [R, 1]; false where a part needed tokens outside of the window.
        whole: the window is the vocabulary (known on the host).
    """

    values: Tensor
    ids: Tensor
    everything: Callable[[], Tensor]
    complete: Tensor
    fits: Tensor
    whole: bool = False

    @staticmethod
    def of(logits: Tensor, count: int) -> Candidates:
        """The ``count`` likeliest tokens of each row of [R, V]."""
        values, ids = likeliest(logits, count)
        whole = values.shape[1] == logits.shape[1]
        last = values[:, -1:]
        every_row = torch.ones_like(last, dtype=torch.bool)
        return Candidates(values, ids, lambda: logits, every_row if whole else last == -torch.inf, every_row, whole)

    def keep(self, kept: Tensor, decided: Tensor) -> Candidates:
        """Without the tokens where ``kept`` [R, K] is false.

        ``decided`` bool [R, 1]: the part removed everything outside of the window in these rows, and knows it.
        """
        return self._replace(values=self.values.masked_fill(~kept, -torch.inf), complete=self.complete | decided)

    def need(self, enough: Tensor) -> Candidates:
        """Rows where ``enough`` bool [R, 1] is false must be done in full, unless nothing is left outside anyway."""
        return self._replace(fits=self.fits & (enough | self.complete))

    def cut(self, limit: Tensor, enough: Tensor | None = None) -> Candidates:
        """Without the tokens below ``limit`` [R, 1]; NaN stays, to be found.

        The window reaches far enough where something in it goes: then everything behind it goes too. ``enough`` bool
        [R, 1]: rows in which it does anyway, such as those of limit -inf.
        """
        complete = self.complete | (self.values[:, -1:] < limit)
        fits = self.fits & (complete if enough is None else complete | enough)
        values = self.values.masked_fill(self.values < limit, -torch.inf)
        return Candidates(values, self.ids, self.everything, complete, fits, self.whole)

    def index_of_best(self, scores: Tensor) -> Tensor:
        """int64 [R]: where in the window the largest of ``scores`` [R, K] is; the lowest token id among equals."""
        best = scores == scores.amax(-1, keepdim=True)
        return torch.where(best, self.ids, torch.iinfo(torch.int64).max).argmin(-1)


def argmax(logits: Tensor) -> Tensor:
    """``logits.argmax(-1)`` of [R, V], the first among equals, NaN before all else; in two stages on the CPU, where
    the largest of a chunk is found five times faster than its place."""
    rows, vocab_size = logits.shape
    size = _CHUNKS[0]
    if logits.device.type != "cpu" or vocab_size % size or vocab_size < size * size:
        return logits.argmax(-1)
    grouped = logits.reshape(rows, -1, size)
    chunk = grouped.amax(-1).argmax(-1)
    return chunk * size + grouped[_row_numbers(rows, logits.device)[:, 0], chunk].argmax(-1)


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``logits.topk(count)`` of [R, V], in two stages where that is faster: the best chunks hold the best tokens."""
    rows, vocab_size = logits.shape
    count = min(count, vocab_size)
    size = next((size for size in _CHUNKS if count * size * 8 <= vocab_size and vocab_size % size == 0), 0)
    if not size:
        best = logits.topk(count)
        return best.values, best.indices
    chunks = logits.reshape(-1, size)
    chosen = chunks.amax(-1).view(rows, -1).topk(count, sorted=False).indices
    first = _row_numbers(rows, logits.device) * (vocab_size // size)
    inside = chunks.index_select(0, (chosen + first).flatten()).view(rows, -1)
    best = inside.topk(count)
    shift = size.bit_length() - 1  # chunks are powers of two
    return best.values, (chosen.gather(1, best.indices >> shift) << shift) + (best.indices & size - 1)


@lru_cache(maxsize=64)
def _row_numbers(rows: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device)[:, None]
