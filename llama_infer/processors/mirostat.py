"""Mirostat: a truncation that steers the surprise of the chosen tokens towards a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..parts import Param, Trait

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch, Column

_ESTIMATED_FROM = 100


class Mirostat:
    """Keeps the surprise of the text near ``mirostat_tau`` bits a token; ``mirostat`` 1 or 2 is the version, 0 is off.

    A row's ``mu`` starts at ``2 tau``. Version 2 keeps the tokens with ``-log2 p <= mu``. Version 1 fits Zipf's
    exponent s to the 100 likeliest tokens (``s = sum(t b) / sum(t t)``, t_i = ln((i+2)/(i+1)), b_i = ln(p_i/p_(i+1)))
    and keeps the k likeliest, ``k = floor((e 2**mu / (1 - V**-e)) ** (1/s))`` with e = s - 1 and V the vocabulary's
    size. Ties of the last one stay, the likeliest always; where s is 1 or 0 the formula's limit counts. After each
    choice ``mu -= eta * (surprise - tau)``, the surprise in bits under the processed distribution, as in llama.cpp.

    mirostat_tau > 0, 0 <= mirostat_eta. Basu et al. 2021, arXiv 2007.14966. llama.cpp lets no other truncation run
    beside it; here whatever is in the chain does, so leave them neutral for the paper's method. Greedy rows pass it by.
    """

    name = "mirostat"
    params = {
        "mirostat": Param(
            default=0, neutral=0, check=lambda v: v in (0, 1, 2), range="0, 1 or 2", help="mirostat's version; 0 is off"
        ),
        "mirostat_tau": Param(
            default=5.0,
            check=lambda v: 0 < v < math.inf,
            range="0 < mirostat_tau < inf",
            help="the surprise to aim at, in bits a token",
        ),
        "mirostat_eta": Param(
            default=0.1,
            check=lambda v: 0 <= v < math.inf,
            range="0 <= mirostat_eta < inf",
            help="how fast mirostat corrects itself",
        ),
    }
    traits: frozenset[Trait] = frozenset({"pure", "keeps_argmax", "row_independent", "stateful"})

    def state(self, batch: Batch) -> Mapping[str, Column]:
        """``mirostat_mu`` [R]."""
        return {"mirostat_mu": 2.0 * batch["mirostat_tau"]}

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        import torch

        from .moments import drop_below, total, wide

        version, bits = batch["mirostat"][:, None], wide(batch["mirostat_mu"])[:, None]
        largest, log_total = total(logits)
        limit = (log_total - bits * math.log(2)).minimum(largest)
        if not batch.all_equal("mirostat", 2) and 1 in batch.values.get("mirostat", {1}):
            limit = torch.where(version == 1, _last_of_zipf(logits, bits, version == 1), limit)
        return drop_below(logits, limit.masked_fill(version == 0, -math.inf))

    def accept(self, logits: Tensor, tokens: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """The new ``mirostat_mu``."""
        from .moments import total, wide

        chosen = wide(logits.gather(1, tokens.clamp(0, logits.shape[1] - 1)[:, None]))
        surprise = ((total(logits)[1] - chosen) / math.log(2))[:, 0]
        mu = batch["mirostat_mu"]
        renewed = mu - batch["mirostat_eta"] * (surprise - batch["mirostat_tau"])
        return {"mirostat_mu": renewed.to(mu.dtype).where((batch["mirostat"] > 0) & surprise.isfinite(), mu)}


def _last_of_zipf(logits: Tensor, bits: Tensor, wanted: Tensor) -> Tensor:
    """Version 1: the smallest logit that stays, [R, 1]."""
    import torch

    from ..rows import likeliest
    from .moments import descending, wide

    size = logits.shape[1]
    best = wide(likeliest(logits, _ESTIMATED_FROM)[0])
    falls = (best[:, :-1] - best[:, 1:]).nan_to_num(0.0, posinf=0.0)
    steps = torch.arange(1, best.shape[1], device=logits.device, dtype=best.dtype)
    steps = ((steps + 1) / steps).log() * (best[:, 1:] > -math.inf)
    slope = (steps * falls).sum(-1, keepdim=True) / (steps * steps).sum(-1, keepdim=True)
    excess = slope - 1
    flat = excess.abs() < 1e-9
    ratio = torch.where(flat, 1 / math.log(max(2, size)), excess / -torch.expm1(-excess * math.log(max(2, size))))
    log_count = (ratio.log() + bits * math.log(2)) / slope
    counted = log_count.nan_to_num(0.0).clamp(0, math.log(size)).exp().floor().long().clamp(1, size)
    count = torch.where(log_count >= math.log(size), size, counted).where(wanted, 1)
    if logits.device.type == "cpu":
        ordered = likeliest(logits, int(count.max()) if len(count) else 1)[0]
    else:
        ordered = descending(logits)  # no look at the counts: that would wait for the device
    return wide(ordered.gather(1, count - 1))
