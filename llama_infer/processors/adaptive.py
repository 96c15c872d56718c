"""Adaptive samplers: adaptive-p, which aims at tokens of a given probability, and the entropy-dependent temperature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import PartError
from ..parts import Context, Param, Trait

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch, Column

_PEAK, _SHARPNESS, _WIDTH = 5.0, 10.0, 0.3


class AdaptiveP:
    """Prefers tokens whose probability is near a target; negative is off.

    A token of probability p gets the logit ``5 - 10 d**2 / (1 + d)`` with ``d = abs(p - a) / 0.3``. The adapted target
    ``a = 2 adaptive_target - average``, kept in [0, 1], makes up for what was chosen before: ``average`` is the mean of
    the chosen tokens' own probabilities (before this transform), each step back weighing ``adaptive_decay`` as much; it
    starts as if every token so far had been on target. ``adaptive_target`` <= 1, 0 <= adaptive_decay <= 0.99. llama.cpp
    PR 17927. It replaces the distribution, so put it last, behind a mild truncation such as min_p.

    The part remembers the logits of a call until ``accept`` follows for the same batch, because what ``accept`` is
    given no longer tells the tokens' own probabilities.
    """

    name = "adaptive_p"
    params = {
        "adaptive_target": Param(
            default=-1.0,
            neutral=-1.0,
            check=lambda v: -math.inf < v <= 1,
            range="adaptive_target <= 1",
            help="the probability of tokens to aim at; negative is off",
        ),
        "adaptive_decay": Param(
            default=0.9,
            check=lambda v: 0 <= v <= 0.99,
            range="0 <= adaptive_decay <= 0.99",
            help="how long adaptive-p remembers: about 1 / (1 - decay) tokens",
        ),
    }
    traits: frozenset[Trait] = frozenset({"pure", "row_independent", "stateful"})

    def __init__(self) -> None:
        self._seen: tuple[Batch, Tensor, Tensor] | None = None

    def bind(self, context: Context) -> AdaptiveP:
        """One of its own for each engine, because of what it remembers."""
        return AdaptiveP()

    def state(self, batch: Batch) -> Mapping[str, Column]:
        """The weighted sum of chosen probabilities and of the weights, [R]."""
        weight = 1 / (1 - batch["adaptive_decay"])
        return {"adaptive_sum": batch["adaptive_target"].clamp(min=0) * weight, "adaptive_weight": weight}

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        from .moments import mapped, total, wide

        target = wide(batch["adaptive_target"])
        largest, log_total = total(logits)
        self._seen = (batch, logits, log_total)
        average = batch["adaptive_sum"] / batch["adaptive_weight"]
        aim = (2 * target - average).clamp(0, 1)[:, None]
        numbers = (number.to(logits.dtype) for number in (largest, log_total - largest, aim))
        return mapped(_aimed, logits, *numbers, (target < 0)[:, None])

    def accept(self, logits: Tensor, tokens: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """The new sums."""
        from .moments import wide

        seen, self._seen = self._seen, None
        if seen is None or seen[0] is not batch:
            raise PartError("adaptive_p: accept() must follow the call with the same batch")
        _, given, log_total = seen
        chosen = wide(given.gather(1, tokens.clamp(0, given.shape[1] - 1)[:, None]))
        probability = (chosen - log_total).exp()[:, 0]
        counts = (batch["adaptive_target"] >= 0) & probability.isfinite()
        decay = batch["adaptive_decay"]
        renewed = {
            "adaptive_sum": probability + decay * batch["adaptive_sum"],
            "adaptive_weight": 1 + decay * batch["adaptive_weight"],
        }
        return {name: value.to(batch[name].dtype).where(counts, batch[name]) for name, value in renewed.items()}


def _aimed(block: Tensor, largest: Tensor, log_total: Tensor, aim: Tensor, off: Tensor) -> Tensor:
    probabilities = (block - largest).sub_(log_total).exp_()
    distance = probabilities.sub_(aim).abs_().div_(_WIDTH)
    aimed = _PEAK - _SHARPNESS * distance * distance / (1 + distance)
    return block.where(off | (block == -math.inf), aimed)


class EntropyTemperature:
    """Divides the logits by ``edt_base ** (edt_theta / H)``, H the row's entropy in nats: certain rows become greedy.

    With the parameter ``temperature`` (T0) this is EDT's ``T = T0 * N ** (theta / H)``, N = ``edt_base`` (the paper's
    0.8); put it before the temperature, since H is the model's own. ``edt_theta`` = 0 is off. 0 <= edt_theta,
    0 < edt_base < 1. The largest logit is moved to 0, which changes no probability. Zhang, Bao, Huang 2024,
    arXiv 2403.14541.
    """

    name = "edt"
    params = {
        "edt_theta": Param(
            default=0.0,
            neutral=0.0,
            check=lambda v: 0 <= v < math.inf,
            range="0 <= edt_theta < inf",
            help="how strongly low entropy cools a row; 0 is off",
        ),
        "edt_base": Param(
            default=0.8, check=lambda v: 0 < v < 1, range="0 < edt_base < 1", help="EDT's N, the base of its power"
        ),
    }
    traits: frozenset[Trait] = frozenset({"pure", "keeps_argmax", "row_independent"})

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        from .dynamic import scaled
        from .moments import entropy, wide

        theta, base = wide(batch["edt_theta"])[:, None], wide(batch["edt_base"])[:, None]
        largest, _, nats = entropy(logits)
        return scaled(logits, largest, base ** (theta / nats), theta == 0)
