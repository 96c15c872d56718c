"""The likeliest tokens of each row, on which the end of a chain can be computed instead of on the whole vocabulary.

A truncation keeps few of 128 thousand tokens. One pass finds the likeliest; parts that can (``narrow``) work on those
and say in which rows the window was too small to know; those rows are done again in full. Both ways give the same
choice, because noise belongs to the token id and sums run from the likeliest token down.

A window is used on the CPU only, and is an array of numpy: at a few hundred numbers an operation is all overhead, of
which a tensor has five times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .rows import likeliest

if TYPE_CHECKING:
    from .batch import Batch

Array: TypeAlias = NDArray[Any]

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
        values, ids = (found.numpy() for found in likeliest(logits, count))
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
