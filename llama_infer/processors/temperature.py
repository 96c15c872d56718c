"""Temperature."""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from ..parts import Param, Trait

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch
    from ..candidates import Candidates

_SHIFT_BELOW = 1e-3
_SMALLEST = 1e-30
_UNKNOWN: frozenset[Hashable] = frozenset({0.0})


class Temperature:
    """Divides the logits by ``temperature``: p_i is proportional to exp(logit_i / T).

    0 <= temperature; 1 is neutral. Rows with temperature 0 pass unchanged: the sampler takes their likeliest token.
    Ackley, Hinton, Sejnowski 1985; transformers' TemperatureLogitsWarper.
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
        if _any_tiny(batch.values.get("temperature", _UNKNOWN)):
            scores = candidates.tensor()
            values = _divided(scores, scores[:, :1], batch).numpy()
        else:
            from ..candidates import column

            values = candidates.values / column(batch, "temperature")
        return candidates._replace(values=values, everything=cache(lambda: self(candidates.everything(), batch)))

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        return _divided(logits, None, batch)


def _divided(logits: Tensor, largest: Tensor | None, batch: Batch) -> Tensor:
    """The quotients. Where a temperature is tiny, with its row's ``largest`` logit at 0: no probability changes by that
    and quotients stay finite."""
    temperature = batch["temperature"].to(logits.dtype)[:, None]
    if not _any_tiny(batch.values.get("temperature", _UNKNOWN)):
        return logits / temperature
    divisor = temperature.clamp(min=_SMALLEST).masked_fill(temperature == 0, 1.0)
    shift = logits.amax(-1, keepdim=True) if largest is None else largest
    return (logits - shift.where((divisor < _SHIFT_BELOW) & shift.isfinite(), shift.new_zeros(()))) / divisor


@lru_cache(maxsize=64)
def _any_tiny(values: frozenset[Hashable]) -> bool:
    return any(isinstance(value, float) and value < _SHIFT_BELOW for value in values)
