"""Temperatures that depend on the distribution: dynamic temperature and quadratic smoothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..parts import Param, Trait

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch

_COLDEST = 1e-30


class DynamicTemperature:
    """Divides the logits by a temperature that grows from ``dynatemp_low`` to ``dynatemp_high`` with the entropy.

    ``T = low + (high - low) * (H / log n) ** dynatemp_exponent``, H the entropy in nats and n the number of tokens that
    are left. Off where low and high are both 0. A low above high cools uncertain rows instead. The largest logit is
    moved to 0, which changes no probability.

    It multiplies with ``temperature``: leave that at 1. ``temp`` t with ``dynatemp_range`` r of llama.cpp and koboldcpp
    is ``dynatemp_low=max(0, t - r), dynatemp_high=t + r``; text-generation-webui has the same three parameters (there
    n is the vocabulary's size). 0 <= low, high, exponent. Kalomaze's, as llama.cpp has it (``temp_ext``).
    """

    name = "dynamic_temperature"
    params = {
        "dynatemp_low": Param(
            default=0.0,
            neutral=0.0,
            check=lambda v: 0 <= v < math.inf,
            range="0 <= dynatemp_low < inf",
            help="the temperature of a row that is certain",
        ),
        "dynatemp_high": Param(
            default=0.0,
            neutral=0.0,
            check=lambda v: 0 <= v < math.inf,
            range="0 <= dynatemp_high < inf",
            help="the temperature of a row that knows nothing; 0 with dynatemp_low=0 is off",
        ),
        "dynatemp_exponent": Param(
            default=1.0,
            check=lambda v: 0 <= v < math.inf,
            range="0 <= dynatemp_exponent < inf",
            help="how the temperature follows the entropy",
        ),
    }
    traits: frozenset[Trait] = frozenset({"pure", "keeps_argmax", "row_independent"})

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        from .moments import by_blocks, entropy, wide

        low, high, exponent = (
            wide(batch[name])[:, None] for name in ("dynatemp_low", "dynatemp_high", "dynatemp_exponent")
        )
        largest, _, nats = entropy(logits)
        most = by_blocks(_count, logits)[0].log()
        temperature = low + (high - low) * (nats / most).clamp(max=1) ** exponent
        return scaled(logits, largest, temperature, (low == 0) & (high == 0))


class QuadraticSmoothing:
    """Bends the logits: ``-k f d**2 + s f d**3`` with d = logit - max, k = (3 - c) / 2 and s = (c - 1) / 2.

    f is ``smoothing_factor`` (0 is off; small values flatten the top and cut the tail), c is ``smoothing_curve`` (1 is
    the plain parabola; above 3 tokens next to the likeliest overtake it). 0 <= f, 1 <= c. Kalomaze's quadratic
    sampling, text-generation-webui and koboldcpp, which add the maximum back: no probability changes by that. The usual
    temperature beside it is 1.
    """

    name = "quadratic_smoothing"
    params = {
        "smoothing_factor": Param(
            default=0.0,
            neutral=0.0,
            check=lambda v: 0 <= v < math.inf,
            range="0 <= smoothing_factor < inf",
            help="how strongly the logits are bent; 0 is off",
        ),
        "smoothing_curve": Param(
            default=1.0,
            check=lambda v: 1 <= v < math.inf,
            range="1 <= smoothing_curve < inf",
            help="above 1 the tail falls faster",
        ),
    }
    traits: frozenset[Trait] = frozenset({"pure", "row_independent"})

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        from .moments import mapped

        factor, curve = (batch[name].to(logits.dtype)[:, None] for name in ("smoothing_factor", "smoothing_curve"))
        return mapped(_bent, logits, factor, curve)


def _bent(block: Tensor, factor: Tensor, curve: Tensor) -> Tensor:
    import torch

    largest = block.amax(-1, keepdim=True)
    distance = (block - largest).clamp_(min=torch.finfo(block.dtype).min)  # -inf times 0 would be NaN
    slope = (curve - 1) / 2 * distance - (3 - curve) / 2
    bent = slope * distance * distance * factor
    return bent.where(factor > 0, block)


def _count(block: Tensor) -> tuple[Tensor]:
    from .moments import wide

    return (wide((block > -math.inf).sum(-1, keepdim=True)),)


def scaled(logits: Tensor, largest: Tensor, temperature: Tensor, off: Tensor) -> Tensor:
    """``(logits - largest) / temperature``; rows that are ``off`` as they are.

    ``largest``, ``temperature`` wide [R, 1], ``off`` bool [R, 1]. A temperature of 0 leaves the likeliest tokens;
    one of NaN (a row without entropy) counts as 1.
    """
    from .moments import mapped

    divisor = temperature.nan_to_num(1.0).clamp(_COLDEST, 1 / _COLDEST).masked_fill(off, 1.0)
    shift = largest.masked_fill(off, 0.0)
    return mapped(_scaled, logits, shift.to(logits.dtype), divisor.to(logits.dtype))


def _scaled(block: Tensor, shift: Tensor, divisor: Tensor) -> Tensor:
    return (block - shift).div_(divisor)
