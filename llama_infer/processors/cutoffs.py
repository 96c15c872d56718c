"""Cutoffs: truncations that keep the tokens above a limit that the whole distribution sets.

A limit on a probability is one on the logit (``log p = logit - log(sum(exp(logits)))``), so each costs one pass for the
sums and one for the comparison. The likeliest token and its equals always stay.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..parts import Param, Trait

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch
    from ..candidates import Candidates

CUTOFF: frozenset[Trait] = frozenset({"pure", "keeps_argmax", "row_independent"})
_TOP_H_WINDOW = 100


class _Cutoff:
    """Keeps the tokens whose logit is at least their row's ``_limit``."""

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        from .moments import drop_below

        return drop_below(logits, self._limit(logits, batch))

    def _limit(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, 1], at most the largest logit; -inf where the row keeps all."""
        raise NotImplementedError


class _WindowedCutoff(_Cutoff):
    """A cutoff whose limit depends on the remaining tokens alone, so that it can be found on candidates."""

    def narrow(self, candidates: Candidates, batch: Batch) -> Candidates:
        """The same on candidates: the limit comes from the window where that is complete, else from all tokens."""
        import torch

        limit = self._limit(candidates.tensor(), batch)
        if not (candidates.whole or candidates.complete.all()):
            limit = limit.where(torch.from_numpy(candidates.complete), self._limit(candidates.everything(), batch))
        limits = limit.numpy().astype(candidates.values.dtype)
        return candidates.cut(limits, limits == -math.inf)


class EpsilonCutoff(_WindowedCutoff):
    """Keeps the tokens of probability ``epsilon_cutoff`` at least; 0 keeps all.

    ``p >= epsilon``, 0 <= epsilon < 1. Hewitt, Manning, Liang 2022, arXiv 2210.15191; transformers'
    EpsilonLogitsWarper.
    """

    name = "epsilon_cutoff"
    params = {
        "epsilon_cutoff": Param(
            default=0.0,
            neutral=0.0,
            check=lambda v: 0 <= v < 1,
            range="0 <= epsilon_cutoff < 1",
            help="drop tokens less likely than this",
        )
    }
    traits = CUTOFF

    def _limit(self, logits: Tensor, batch: Batch) -> Tensor:
        from .moments import total

        largest, log_total = total(logits)
        return (log_total + _column(batch, "epsilon_cutoff").log()).minimum(largest)


class EtaCutoff(_WindowedCutoff):
    """Keeps the tokens of probability ``min(eta, sqrt(eta) * exp(-H))`` at least, H the entropy in nats; 0 keeps all.

    ``eta_cutoff`` is the paper's epsilon, 0 <= eta < 1. Hewitt, Manning, Liang 2022, arXiv 2210.15191; transformers'
    EtaLogitsWarper.
    """

    name = "eta_cutoff"
    params = {
        "eta_cutoff": Param(
            default=0.0,
            neutral=0.0,
            check=lambda v: 0 <= v < 1,
            range="0 <= eta_cutoff < 1",
            help="drop tokens less likely than a limit that falls with the entropy",
        )
    }
    traits = CUTOFF

    def _limit(self, logits: Tensor, batch: Batch) -> Tensor:
        from .moments import entropy

        largest, log_total, nats = entropy(logits)
        eta = _column(batch, "eta_cutoff").log()
        return (log_total + eta.minimum(eta / 2 - nats)).minimum(largest)


class TopA(_WindowedCutoff):
    """Keeps the tokens of probability ``top_a * p_max ** 2`` at least; 0 keeps all, 0 <= top_a <= 1.

    BlinkDL's top-a (RWKV-LM), as koboldcpp and text-generation-webui have it.
    """

    name = "top_a"
    params = {
        "top_a": Param(
            default=0.0,
            neutral=0.0,
            check=lambda v: 0 <= v <= 1,
            range="0 <= top_a <= 1",
            help="drop tokens less likely than this times the square of the largest probability",
        )
    }
    traits = CUTOFF

    def _limit(self, logits: Tensor, batch: Batch) -> Tensor:
        from .moments import total

        largest, log_total = total(logits)
        return (2 * largest - log_total + _column(batch, "top_a").log()).minimum(largest)


class TopNSigma(_WindowedCutoff):
    """Keeps the tokens whose logit is at least ``max - top_n_sigma * std``; 0 keeps all, 0 <= top_n_sigma.

    The standard deviation is the population's, over the finite logits. Temperature scales both sides, so the kept set
    does not depend on it. Tang et al. 2024, arXiv 2411.07641; llama.cpp (where 0 and below turn it off).
    """

    name = "top_n_sigma"
    params = {
        "top_n_sigma": Param(
            default=0.0,
            neutral=0.0,
            check=lambda v: 0 <= v < math.inf,
            range="0 <= top_n_sigma < inf",
            help="keep logits within that many standard deviations of the largest; 0 keeps all",
        )
    }
    traits = CUTOFF

    def _limit(self, logits: Tensor, batch: Batch) -> Tensor:
        from .moments import deviation

        largest, spread = deviation(logits)
        sigmas = _column(batch, "top_n_sigma")
        return (largest - sigmas * spread).masked_fill(sigmas <= 0, -math.inf)


class PLess(_WindowedCutoff):
    """Keeps the tokens of probability ``sum(p ** 2)`` at least: the chance that two draws agree. No parameter but on.

    Tan, Wu, Howard 2025, arXiv 2509.23234.
    """

    name = "p_less"
    params = {
        "p_less": Param(default=False, neutral=False, help="drop tokens less likely than that two draws would agree")
    }
    traits = CUTOFF

    def _limit(self, logits: Tensor, batch: Batch) -> Tensor:
        from .moments import collision

        largest, log_total, log_collision = collision(logits)
        return (log_total + log_collision).minimum(largest).masked_fill(~batch["p_less"][:, None], -math.inf)


class PLessNorm(_Cutoff):
    """p-less, relaxed: keeps ``p >= (V * sum(p ** 2) - 1) / (V - 1)``, V the vocabulary's size. No parameter but on.

    The chance that two draws agree, less that of a disagreement shared among the V - 1 others. Tan, Wu, Howard 2025,
    arXiv 2509.23234. V counts removed tokens too, as the authors' code does, hence no ``narrow``.
    """

    name = "p_less_norm"
    params = {"p_less_norm": Param(default=False, neutral=False, help="p-less with a limit that is 0 on flat rows")}
    traits = CUTOFF
    truncates = True

    def _limit(self, logits: Tensor, batch: Batch) -> Tensor:
        from .moments import collision

        size = logits.shape[1]
        largest, log_total, log_collision = collision(logits)
        relaxed = (size * log_collision.exp() - 1).clamp(min=0) / max(1, size - 1)
        return (log_total + relaxed.log()).minimum(largest).masked_fill(~batch["p_less_norm"][:, None], -math.inf)


class TopH:
    """Keeps the likeliest tokens while their share of the entropy is at most ``top_h``; 1 keeps all, 0 the likeliest.

    With p of the 100 likeliest tokens (renormalised) in descending order: the tokens j with
    ``sum(-p_i log p_i for i <= j) <= top_h * H``, the likeliest always, and ties of the last one. 0 <= top_h <= 1.
    Potraghloo et al. 2025, arXiv 2509.02510; transformers' TopHLogitsWarper, which cuts at 100 tokens even at 1.
    """

    name = "top_h"
    params = {
        "top_h": Param(
            default=1.0,
            neutral=1.0,
            check=lambda v: 0 <= v <= 1,
            range="0 <= top_h <= 1",
            help="keep the likeliest tokens up to this share of the entropy",
        )
    }
    traits = CUTOFF

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        from ..rows import likeliest
        from .moments import drop_below

        return drop_below(logits, self._last(likeliest(logits, _TOP_H_WINDOW)[0], batch))

    def narrow(self, candidates: Candidates, batch: Batch) -> Candidates:
        """The same on candidates; ties of the last one must end inside the window."""
        values = candidates.values
        last = self._last(candidates.tensor()[:, :_TOP_H_WINDOW], batch).numpy()
        inside = (values[:, -1:] < last) & (values.shape[1] >= _TOP_H_WINDOW)
        return candidates.need(inside | (last == -math.inf)).keep(~(values < last), inside)

    def _last(self, best: Tensor, batch: Batch) -> Tensor:
        """The smallest logit that stays, [R, 1], of the likeliest in descending order; -inf where all stay."""
        from .moments import wide

        top_h = _column(batch, "top_h")
        probabilities = wide(best - best[:, :1]).softmax(-1)
        parts = -(probabilities * probabilities.log()).nan_to_num(0.0)
        gathered = parts.cumsum(-1)
        kept = (gathered <= top_h * gathered[:, -1:]).sum(-1, keepdim=True).clamp(min=1)
        return best.gather(1, kept - 1).masked_fill(top_h >= 1, -math.inf)


def _column(batch: Batch, name: str) -> Tensor:
    """A parameter, wide, [R, 1]."""
    from .moments import wide

    return wide(batch[name])[:, None]
