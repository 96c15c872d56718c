"""Truncations: what sets the logits of unlikely tokens to -inf. None of them sorts the vocabulary in the usual case."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..parts import Param, Trait

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch
    from ..candidates import Candidates

TRUNCATION: frozenset[Trait] = frozenset({"pure", "keeps_argmax", "row_independent"})
_WINDOW = 1000
"""How many of the likeliest tokens :class:`TopP` looks at before it falls back to all of them."""


class TopK:
    """Keeps the ``top_k`` likeliest tokens, ties with the last of them included; 0 keeps all."""

    name = "top_k"
    params = {
        "top_k": Param(
            default=0, neutral=0, check=lambda v: v >= 0, range="top_k >= 0", help="keep the k likeliest; 0 keeps all"
        )
    }
    traits = TRUNCATION

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        largest = _largest_k(batch, logits.shape[1])
        if not largest:
            return logits  # every row keeps all
        from ..candidates import likeliest

        best = likeliest(logits, largest)[0]
        last, restricted = self._last(best, batch)
        return logits.masked_fill(restricted & (logits < last), -math.inf)

    def window(self, batch: Batch) -> int:
        """Room for every row's k and as many ties; 0 when some row keeps all."""
        known = batch.values.get("top_k", frozenset({0}))
        return 0 if 0 in known else 2 * max(k for k in known if isinstance(k, int))

    def narrow(self, candidates: Candidates, batch: Batch) -> Candidates:
        """The same on candidates; ties of the last one must end inside the window."""
        values = candidates.values
        last, restricted = self._last(values, batch)
        inside = (batch["top_k"] <= values.shape[1])[:, None] & (values[:, -1:] < last)
        fitting = candidates.need(inside | ~restricted)
        return fitting.keep(~(values < last) | ~restricted, restricted & inside)  # NaN stays, to be found

    def _last(self, best: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The smallest logit that stays [R, 1], and in which rows there is one, bool [R, 1]."""
        top_k = batch["top_k"]
        last = best.gather(1, (top_k - 1).clamp(0, best.shape[1] - 1)[:, None])
        return last, (top_k > 0)[:, None]


def _largest_k(batch: Batch, vocab_size: int) -> int:
    known = batch.values.get("top_k") or frozenset(batch["top_k"].tolist())
    return min(max((k for k in known if isinstance(k, int)), default=0), vocab_size)


class TopP:
    """Keeps the smallest set of likeliest tokens whose probabilities sum to ``top_p`` at least; 1 keeps all.

    A token stays while the tokens likelier than it sum to less than ``top_p``; the likeliest always stays, and ties
    with the last one too. Nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751.
    """

    name = "top_p"
    params = {
        "top_p": Param(
            default=1.0,
            neutral=1.0,
            check=lambda v: 0 <= v <= 1,
            range="0 <= top_p <= 1",
            help="keep the likeliest tokens up to this probability",
        )
    }
    traits = TRUNCATION

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        from ..candidates import Candidates

        # Only a CPU can look at what fits without waiting for itself.
        for count in (_WINDOW, logits.shape[1]) if logits.device.type == "cpu" else (logits.shape[1],):
            candidates = self.narrow(Candidates.of(logits, count), batch)
            if candidates.whole or bool(candidates.fits.all()):
                break
        last = candidates.values.masked_fill(candidates.values == -math.inf, math.inf).amin(-1, keepdim=True)
        return logits.masked_fill((batch["top_p"] < 1)[:, None] & (logits < last), -math.inf)

    def narrow(self, candidates: Candidates, batch: Batch) -> Candidates:
        """The same on candidates."""
        top_p = batch["top_p"].to(candidates.values.dtype)[:, None]
        weights = (candidates.values - candidates.values[:, :1]).exp()
        cumulative = weights.cumsum(-1)
        share = top_p * candidates.total()
        kept = (cumulative - weights < share).sum(-1, keepdim=True).clamp(min=1)
        last = candidates.values.gather(1, kept - 1)
        # The window reaches far enough when something in it goes: then everything behind it goes too.
        inside = candidates.values[:, -1:] < last
        everything = top_p >= 1
        fitting = candidates.need(inside | everything)
        return fitting.keep(~(candidates.values < last) | everything, inside & ~everything)


class MinP:
    """Keeps the tokens that are at least ``min_p`` times as likely as the likeliest; 0 keeps all. arXiv 2407.01082."""

    name = "min_p"
    params = {
        "min_p": Param(
            default=0.0,
            neutral=0.0,
            check=lambda v: 0 <= v <= 1,
            range="0 <= min_p <= 1",
            help="drop tokens less likely than this share of the likeliest",
        )
    }
    traits = TRUNCATION

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        return logits.masked_fill(logits < self._limit(logits.amax(-1, keepdim=True), batch), -math.inf)

    def narrow(self, candidates: Candidates, batch: Batch) -> Candidates:
        """The same on candidates."""
        limit = self._limit(candidates.values[:, :1], batch)
        inside = candidates.values[:, -1:] < limit
        return candidates.need(inside | (limit == -math.inf)).keep(~(candidates.values < limit), inside)

    def _limit(self, largest: Tensor, batch: Batch) -> Tensor:
        return largest + batch["min_p"].to(largest.dtype).log()[:, None]
