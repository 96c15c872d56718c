"""The likeliest tokens of each row, on which the end of a chain can be computed instead of on the whole vocabulary.

A truncation keeps few of 128 thousand tokens. One pass finds the likeliest; parts that can (``narrow``) work on those
and say in which rows the window was too small to know; those rows are done again in full. Both ways give the same
choice, because noise belongs to the token id and sums run from the likeliest token down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_CHUNKS = (64, 32, 16)
"""How many tokens may share a maximum in the first stage of the search."""


@dataclass(frozen=True)
class Candidates:
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
        complete = torch.full_like(values[:, :1], whole, dtype=torch.bool) | (values[:, -1:] == -torch.inf)
        return Candidates(values, ids, lambda: logits, complete, torch.ones_like(complete), whole)

    def keep(self, kept: Tensor, decided: Tensor) -> Candidates:
        """Without the tokens where ``kept`` [R, K] is false.

        ``decided`` bool [R, 1]: the part removed everything outside of the window in these rows, and knows it.
        """
        return replace(self, values=self.values.masked_fill(~kept, -torch.inf), complete=self.complete | decided)

    def need(self, enough: Tensor) -> Candidates:
        """Rows where ``enough`` bool [R, 1] is false must be done in full, unless nothing is left outside anyway."""
        return replace(self, fits=self.fits & (enough | self.complete))

    def total(self) -> Tensor:
        """[R, 1]: the sum of exp(score - largest score), over the window where it is complete, else over all tokens.

        Over the window the sum runs from the likeliest token down, so that it does not depend on the window's size.
        """
        inside = (self.values - self.values[:, :1]).exp().cumsum(-1)[:, -1:]
        if self.whole or bool(self.complete.all()):
            return inside
        total = self.everything().logsumexp(-1, keepdim=True) - self.values[:, :1]
        return inside.where(self.complete, total.exp())

    def index_of_best(self, scores: Tensor) -> Tensor:
        """int64 [R]: where in the window the largest of ``scores`` [R, K] is; the lowest token id among equals."""
        best = scores == scores.amax(-1, keepdim=True)
        return self.ids.masked_fill(~best, torch.iinfo(torch.int64).max).argmin(-1)


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``logits.topk(count)`` of [R, V], in two stages where that is faster: the best chunks hold the best tokens."""
    rows, vocab_size = logits.shape
    count = min(count, vocab_size)
    size = next((size for size in _CHUNKS if count * size * 8 <= vocab_size and vocab_size % size == 0), 0)
    if not size:
        best = logits.topk(count)
        return best.values, best.indices
    grouped = logits.reshape(rows, -1, size)
    chosen = grouped.amax(-1).topk(count, sorted=False).indices
    inside = grouped.gather(1, chosen[:, :, None].expand(-1, -1, size)).flatten(1)
    best = inside.topk(count)
    return best.values, chosen.gather(1, best.indices // size) * size + best.indices % size
