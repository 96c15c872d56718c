"""Samplers: what chooses a token from the processed logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .parts import Param, Trait

if TYPE_CHECKING:
    from torch import Tensor

    from .batch import Batch
    from .candidates import Candidates


class Greedy:
    """The likeliest token; the lowest id among equals."""

    name = "greedy"
    traits: frozenset[Trait] = frozenset({"pure", "row_independent", "greedy_at_zero"})

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> int64 [R]."""
        return logits.argmax(-1)


class Categorical:
    """Draws from softmax(logits) by the Gumbel trick: argmax of logits plus noise; greedy where temperature is 0.

    The noise belongs to the token id, so the choice does not depend on which candidates were looked at.
    """

    name = "categorical"
    params = {
        "temperature": Param(
            default=1.0,
            neutral=1.0,
            check=lambda v: 0 <= v < math.inf,
            range="0 <= temperature < inf",
            help="below 1 sharpens, above 1 flattens, 0 is greedy",
        )
    }
    traits: frozenset[Trait] = frozenset({"pure", "row_independent", "greedy_at_zero"})

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> int64 [R]."""
        if batch.all_equal("temperature", 0.0):
            return logits.argmax(-1)
        drawn = _draw_from_all(logits, batch)
        if 0.0 in batch.values.get("temperature", {0.0}):
            drawn = logits.argmax(-1).where(batch["temperature"] == 0, drawn)
        return drawn

    def choose(self, candidates: Candidates, batch: Batch) -> Tensor:
        """The same on candidates: int64 [R], where in the window the choice is."""
        scores = candidates.values
        if batch.all_equal("temperature", 0.0):
            return candidates.index_of_best(scores)
        noisy = scores + _gumbel(batch, candidates.ids)
        if 0.0 in batch.values.get("temperature", {0.0}):
            noisy = scores.where((batch["temperature"] == 0)[:, None], noisy)
        return candidates.index_of_best(noisy)


def _draw_from_all(logits: Tensor, batch: Batch) -> Tensor:
    import torch

    ids = torch.arange(logits.shape[1], device=logits.device)
    if logits.device.type != "cpu":
        return (logits + _gumbel(batch, ids)).argmax(-1)
    # Row by row, so that the noise stays in the processor's cache.
    rows = [batch.select(torch.tensor([row])) for row in range(len(batch))]
    return torch.cat([(logits[i : i + 1] + _gumbel(row, ids)).argmax(-1) for i, row in enumerate(rows)])


def _gumbel(batch: Batch, ids: Tensor) -> Tensor:
    from . import noise

    return noise.gumbel(batch.uniform("categorical", ids))
