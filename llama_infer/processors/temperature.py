"""Temperature."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..parts import Param

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch

TEMPERATURE = Param(
    default=1.0,
    neutral=1.0,
    check=lambda v: 0 <= v < math.inf,
    range="0 <= temperature < inf",
    help="below 1 sharpens, above 1 flattens, 0 is greedy",
)
"""Shared with the sampler, which makes 0 greedy."""

_SHIFT_BELOW = 1e-3
_SMALLEST = 1e-30


class Temperature:
    """Divides the logits by ``temperature``: p_i is proportional to exp(logit_i / T).

    Rows with temperature 0 pass unchanged: the sampler takes their likeliest token.
    """

    name = "temperature"
    params = {"temperature": TEMPERATURE}
    pure = True

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        temperature = batch["temperature"].to(logits.dtype)
        divisor = temperature.masked_fill(temperature == 0, 1.0).clamp(min=_SMALLEST)[:, None]
        if any(isinstance(v, float) and v < _SHIFT_BELOW for v in batch.values.get("temperature", {0.0})):
            # Changes no probability and keeps the quotients finite: a shifted row's maximum is 0.
            shift = logits.amax(-1, keepdim=True)
            logits = logits - shift.where(((divisor < _SHIFT_BELOW) & shift.isfinite()), shift.new_zeros(()))
        return logits / divisor
