"""Truncations that need the order of the tokens, not just a limit: locally typical and tail-free sampling.

Neither sorts the vocabulary in the usual case.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..parts import Param, Trait

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch
    from ..candidates import Candidates

_BINS = 4096
_BINS_PER_NAT = 128
_WINDOW = 256
_STRAIGHT = 1e-9


class TypicalP:
    """Keeps the tokens whose surprise is nearest to the entropy, up to the probability ``typical_p``; 1 keeps all.

    In ascending order of ``abs(-log p - H)``, H the entropy: the smallest set whose probabilities sum to ``typical_p``
    at least, and ties of the last one. 0 < typical_p <= 1. The likeliest token may go. Meister et al. 2022,
    arXiv 2202.00666; transformers' TypicalLogitsWarper.
    """

    name = "typical_p"
    params = {
        "typical_p": Param(
            default=1.0,
            neutral=1.0,
            check=lambda v: 0 < v <= 1,
            range="0 < typical_p <= 1",
            help="keep the most typical tokens up to this probability",
        )
    }
    traits: frozenset[Trait] = frozenset({"pure", "row_independent"})
    truncates = True

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        import torch

        from ..rows import likeliest
        from .moments import drop_above, drop_below, entropy, wide

        largest, log_total, nats = entropy(logits)
        log_total = log_total - largest
        centre, mass = log_total - nats, wide(batch["typical_p"])[:, None]
        # Only a CPU can look at what the window holds without waiting for itself.
        best = likeliest(logits, _WINDOW if logits.device.type == "cpu" else logits.shape[1])[0]
        shifted = wide(best) - largest
        distance = (shifted - centre).abs()
        limit, certain = _typical_limit(distance, (shifted - log_total).exp(), mass)
        kept = distance <= limit
        # Something in the window is nearer than its last token, so that is less likely than a typical one, and what
        # is outside of the window is further off than it.
        certain &= limit < distance[:, -1:]
        everything = (mass >= 1) | ~log_total.isfinite()
        lowest = best.masked_fill(~kept, math.inf).amin(-1, keepdim=True).masked_fill(everything, -math.inf)
        highest = best.masked_fill(~kept, -math.inf).amax(-1, keepdim=True).masked_fill(everything, math.inf)
        out = drop_below(logits, lowest)
        if logits.device.type != "cpu" or bool((highest < largest).any()):
            out = drop_above(out, highest.masked_fill(highest >= largest, math.inf))
        if best.shape[1] < logits.shape[1]:
            rows = (~(certain | everything)[:, 0]).nonzero()[:, 0].tolist()
            numbers = torch.cat([largest, centre, log_total, mass], -1).tolist()
            keep = _Histogram(logits)
            for row in rows:
                keep(logits[row], *numbers[row], out=out[row])
        return out


def _typical_limit(distance: Tensor, probabilities: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The largest distance that stays, [R, 1], by sorting, and where the mass was reached."""
    ordered, order = distance.sort(-1)
    gathered = probabilities.gather(1, order).cumsum(-1)
    last = (gathered < mass).sum(-1, keepdim=True)
    return ordered.gather(1, last.clamp(max=distance.shape[1] - 1)), last < distance.shape[1]


class _Histogram:
    """Typical sampling of single rows without sorting them, in memory that all rows share.

    A histogram of the distances finds the bin in which the mass is reached; only that is sorted.
    """

    def __init__(self, logits: Tensor) -> None:
        import torch

        size = logits.shape[1]
        self.distance, self.scratch = logits.new_empty(size), logits.new_empty(size)
        self.weights = torch.empty(size, dtype=torch.float64)
        self.bins = torch.empty(size, dtype=torch.int32)

    def __call__(self, row: Tensor, base: float, centre: float, log_total: float, mass: float, *, out: Tensor) -> None:
        """``centre`` and ``log_total`` count from ``base``, the largest logit."""
        import torch

        distance = torch.sub(row, base, out=self.distance)
        probabilities = self.weights.copy_(torch.sub(distance, log_total, out=self.scratch).exp_())
        distance.sub_(centre).abs_()
        bins = self.bins.copy_(torch.mul(distance, _BINS_PER_NAT, out=self.scratch).clamp_(max=_BINS - 1))
        weights = torch.bincount(bins, weights=probabilities, minlength=_BINS)
        gathered = weights.cumsum(0)
        at = min(int((gathered < mass).sum()), _BINS - 1)
        inside = (bins == at).nonzero()[:, 0]
        limit = math.inf
        if len(inside):
            rest = torch.tensor([[mass - float(gathered[at]) + float(weights[at])]], dtype=torch.float64)
            limit = float(_typical_limit(distance[inside][None], probabilities[inside][None], rest)[0])
        # inf where a token stays, -inf where not, without a branch: the smaller of that and the logit.
        gate = torch.ops.aten.threshold_(distance, limit, -math.inf).mul_(-math.inf)
        torch.minimum(row, gate, out=out)


class TailFree:
    """Keeps the tokens before the flat tail of the sorted probabilities begins; ``tfs`` = 1 keeps all, 0 <= tfs <= 1.

    With p in descending order and the curve's bends ``b_i = abs(p_i - 2 p_(i+1) + p_(i+2))``, divided by their sum: as
    many of the likeliest as there are i with ``b_0 + ... + b_i <= tfs``, at least one, and ties of the last one. Where
    nothing bends, or two tokens are left, all stay. trentonbricken.com/Tail-Free-Sampling, as llama.cpp and koboldcpp
    had it (text-generation-webui keeps one token more).
    """

    name = "tfs"
    params = {
        "tfs": Param(
            default=1.0,
            neutral=1.0,
            check=lambda v: 0 <= v <= 1,
            range="0 <= tfs <= 1",
            help="cut the tail where the sorted probabilities flatten",
        )
    }
    traits: frozenset[Trait] = frozenset({"pure", "keeps_argmax", "row_independent"})

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        from ..rows import likeliest
        from .moments import descending, drop_below

        if logits.device.type != "cpu":  # no look at what a window holds: that would wait for the device
            best = descending(logits)
            return drop_below(logits, self._last(best, best[:, :1] == best[:, :1], batch)[0])
        best = likeliest(logits, _WINDOW)[0]
        whole = best.shape[1] == logits.shape[1]
        last, known = self._last(best, (best[:, -1:] == -math.inf) | whole, batch)
        if not bool(known.all()):
            rows = (~known[:, 0]).nonzero()[:, 0]
            exact = self._last(descending(logits[rows]), known[rows] | True, batch.select(rows))[0]
            last = last.index_copy(0, rows, exact)
        return drop_below(logits, last)

    def narrow(self, candidates: Candidates, batch: Batch) -> Candidates:
        """The same on candidates; ties of the last one must end inside the window."""
        import torch

        values = candidates.values
        found = self._last(candidates.tensor(), torch.from_numpy(candidates.complete), batch)
        last, known = found[0].numpy(), found[1].numpy()
        inside = (values[:, -1:] < last) & known
        return candidates.need(inside | (known & (last == -math.inf))).keep(~(values < last), inside)

    def _last(self, values: Tensor, complete: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The smallest logit that stays, [R, 1] (-inf where all do), and in which rows that is certain.

        ``values`` [R, K] descending. Bends outside of them sum to twice the last probability at most.
        """
        from .moments import wide

        tfs = wide(batch["tfs"])[:, None]
        if values.shape[1] < 3:
            return values[:, :1].new_full((len(values), 1), -math.inf), complete | (tfs >= 1)
        curve = wide(values - values[:, :1]).exp()
        bends = (curve[:, :-2] - 2 * curve[:, 1:-1] + curve[:, 2:]).abs()
        bends = bends.masked_fill(values[:, 2:] == -math.inf, 0)
        gathered = bends.cumsum(-1)
        least = gathered[:, -1:]
        most = least + (2 * curve[:, -2:-1]).masked_fill(complete, 0)
        kept = (gathered <= tfs * least).sum(-1, keepdim=True)
        certain = complete | (kept == (gathered <= tfs * most).sum(-1, keepdim=True)) & (least > _STRAIGHT)
        last = values.gather(1, (kept - 1).clamp(min=0))
        everything = (tfs >= 1) | ~(least > _STRAIGHT)
        return last.masked_fill(everything, -math.inf), certain | (tfs >= 1)
