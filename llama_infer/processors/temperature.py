"""Temperature."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from ..parts import Param, Trait

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch
    from ..candidates import Candidates

_SHIFT_BELOW = 1e-3
_SMALLEST = 1e-30


class Temperature:
    """Divides the logits by ``temperature``: p_i is proportional to exp(logit_i / T).

    Rows with temperature 0 pass unchanged: the sampler takes their likeliest token.
    """

    name = "temperature"
    params = {
        "temperature": Param(
            default=1.0,
            neutral=1.0,
            check=lambda v: 0 <= v < math.inf,
            range="0 <= temperature < inf",
            help="below 1 sharpens, above 1 flattens, 0 is greedy",
        )
    }
    traits: frozenset[Trait] = frozenset({"pure", "keeps_argmax", "row_independent"})
    truncates = False

    def narrow(self, candidates: Candidates, batch: Batch) -> Candidates:
        """The same on candidates."""
        values = candidates.values
        divisor = _divisor(values, batch)
        values = _shifted(values, values[:, :1], divisor, batch) / divisor
        return replace(candidates, values=values, everything=cache(lambda: self(candidates.everything(), batch)))

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        divisor = _divisor(logits, batch)
        return _shifted(logits, None, divisor, batch) / divisor


def _divisor(logits: Tensor, batch: Batch) -> Tensor:
    temperature = batch["temperature"]
    if not _any_tiny(batch):
        return temperature.to(logits.dtype)[:, None]
    return temperature.clamp(min=_SMALLEST).masked_fill(temperature == 0, 1.0).to(logits.dtype)[:, None]


def _shifted(logits: Tensor, largest: Tensor | None, divisor: Tensor, batch: Batch) -> Tensor:
    """With a row's maximum at 0 where the temperature is tiny: no probability changes and quotients stay finite."""
    if not _any_tiny(batch):
        return logits
    shift = logits.amax(-1, keepdim=True) if largest is None else largest
    return logits - shift.where((divisor < _SHIFT_BELOW) & shift.isfinite(), shift.new_zeros(()))


def _any_tiny(batch: Batch) -> bool:
    return any(isinstance(v, float) and v < _SHIFT_BELOW for v in batch.values.get("temperature", {0.0}))
