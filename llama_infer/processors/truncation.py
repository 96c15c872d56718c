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


class TopK:
    """Keeps the ``top_k`` likeliest tokens, ties with the last of them included; 0 keeps all.

    ``logit >= the k-th largest``, 0 <= top_k. Fan, Lewis, Dauphin 2018, arXiv 1805.04833.
    """

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
        from ..rows import likeliest
        from .moments import drop_below

        return drop_below(logits, self._last(likeliest(logits, largest)[0], batch))

    def window(self, batch: Batch) -> int:
        """Room for every row's k and as many ties; 0 when some row keeps all."""
        known = batch.values.get("top_k", frozenset({0}))
        return 0 if 0 in known else 2 * max(k for k in known if isinstance(k, int))

    def narrow(self, candidates: Candidates, batch: Batch) -> Candidates:
        """The same on candidates; ties of the last one must end inside the window."""
        from ..candidates import column

        last = self._last(candidates.tensor(), batch).numpy()
        every_row = 0 not in batch.values.get("top_k", {0})
        return candidates.cut(last, None if every_row else column(batch, "top_k") == 0)

    def _last(self, best: Tensor, batch: Batch) -> Tensor:
        """The smallest logit that stays, [R, 1], of the likeliest in descending order; -inf where all of them do."""
        known = batch.values.get("top_k", ())
        if len(known) == 1:
            (k,) = known
            if isinstance(k, int) and 0 < k <= best.shape[1]:
                return best[:, k - 1 : k]
        top_k = batch["top_k"][:, None]
        last = best.gather(1, (top_k - 1).clamp(0, best.shape[1] - 1))
        return last.masked_fill((top_k == 0) | (top_k > best.shape[1]), -math.inf)


def _largest_k(batch: Batch, vocab_size: int) -> int:
    known = batch.values.get("top_k") or frozenset(batch["top_k"].tolist())
    return min(max((k for k in known if isinstance(k, int)), default=0), vocab_size)


class TopP:
    """Keeps the smallest set of likeliest tokens whose probabilities sum to ``top_p`` at least; 1 keeps all.

    A token stays while the tokens likelier than it sum to less than ``top_p``; the likeliest always stays, and ties
    with the last one too. 0 <= top_p <= 1. Nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751.
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
        from .moments import drop_below, nucleus

        top_p = self._share(batch)
        return drop_below(logits, nucleus(logits, top_p).masked_fill(top_p >= 1, -math.inf))

    def narrow(self, candidates: Candidates, batch: Batch) -> Candidates:
        """The same on candidates."""
        import numpy as np
        import torch

        from ..candidates import column
        from .moments import mass

        values, share = candidates.values, column(batch, "top_p").astype(np.float64)
        # torch's exp, as on whole rows: the last bit may decide.
        weights = torch.from_numpy(values - values[:, :1]).exp_().numpy().astype(np.float64)
        gathered = weights.cumsum(-1)
        total = gathered[:, -1:]
        if not (candidates.whole or candidates.complete.all()):
            total = np.where(candidates.complete, total, mass(candidates.everything()).numpy())
        held = np.maximum((gathered - weights < share * total).sum(-1), 1)
        last = values[np.arange(len(values)), held - 1][:, None]
        if 1.0 not in batch.values.get("top_p", {1.0}):
            return candidates.cut(last)
        return candidates.cut(np.where(share >= 1, -np.inf, last), share >= 1)

    def _share(self, batch: Batch) -> Tensor:
        from .moments import wide

        return wide(batch["top_p"])[:, None]


class MinP:
    """Keeps the tokens that are at least ``min_p`` times as likely as the likeliest; 0 keeps all.

    ``p >= min_p * p_max``, 0 <= min_p <= 1. Nguyen et al. 2024, arXiv 2407.01082.
    """

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
        from .moments import drop_below

        return drop_below(logits, self._limit(logits.amax(-1, keepdim=True), batch))

    def narrow(self, candidates: Candidates, batch: Batch) -> Candidates:
        """The same on candidates."""
        limit = self._limit(candidates.tensor()[:, :1], batch).numpy()
        return candidates.cut(limit, None if 0.0 not in batch.values.get("min_p", {0.0}) else limit == -math.inf)

    def _limit(self, largest: Tensor, batch: Batch) -> Tensor:
        return largest + batch["min_p"].to(largest.dtype).log()[:, None]
