"""Truncations: what sets the logits of unlikely tokens to -inf. None of them sorts the vocabulary in the usual case."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..parts import Param

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch

_WINDOW = 1024
"""How many of the likeliest tokens :class:`TopP` looks at before it falls back to all of them."""


class TopK:
    """Keeps the ``top_k`` likeliest tokens, ties with the last of them included; 0 keeps all."""

    name = "top_k"
    params = {
        "top_k": Param(
            default=0, neutral=0, check=lambda v: v >= 0, range="top_k >= 0", help="keep the k likeliest; 0 keeps all"
        )
    }
    pure = True

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        vocab_size = logits.shape[1]
        top_k = batch["top_k"]
        known = batch.values.get("top_k") or frozenset(top_k.tolist())
        largest = max((k for k in known if isinstance(k, int) and 0 < k < vocab_size), default=0)
        if not largest:
            return logits
        best = logits.topk(largest).values
        last = best.gather(1, (top_k - 1).clamp(0, largest - 1)[:, None])
        restricted = ((top_k > 0) & (top_k < vocab_size))[:, None]
        return logits.masked_fill(restricted & (logits < last), -math.inf)


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
    pure = True

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        top_p = batch["top_p"].to(logits.dtype)[:, None]
        total = logits.logsumexp(-1, keepdim=True)
        last, found = _last_kept(logits.topk(min(_WINDOW, logits.shape[1])).values, total, top_p)
        if logits.shape[1] > _WINDOW and not bool(found.all()):
            last = last.where(found, _last_kept(logits.sort(-1, descending=True).values, total, top_p)[0])
        return logits.masked_fill((top_p < 1) & (logits < last), -math.inf)


def _last_kept(best: Tensor, total: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest logit that stays [R, 1], and whether ``best`` (descending [R, K]) reaches as far as it [R, 1]."""
    probabilities = (best - total).exp()
    cumulative = probabilities.cumsum(-1)
    kept = (cumulative - probabilities < top_p).sum(-1, keepdim=True).clamp(min=1)
    found = (cumulative[:, -1:] >= top_p) | (best[:, -1:] == -math.inf) | (top_p >= 1)
    return best.gather(1, kept - 1), found


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
    pure = True

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        limit = logits.amax(-1, keepdim=True) + batch["min_p"].to(logits.dtype).log()[:, None]
        return logits.masked_fill(logits < limit, -math.inf)
