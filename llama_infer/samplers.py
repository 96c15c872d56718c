"""Samplers: what chooses a token from the processed logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .processors.temperature import TEMPERATURE

if TYPE_CHECKING:
    from torch import Tensor

    from .batch import Batch

_WINDOW = 1024
"""Candidates that noise is drawn for at first, when something truncates but nobody knows how much."""


class Greedy:
    """The likeliest token; the lowest id among equals."""

    name = "greedy"
    pure = True

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> int64 [R]."""
        return logits.argmax(-1)


class Categorical:
    """Draws from softmax(logits) by the Gumbel trick: argmax of logits plus noise; greedy where temperature is 0.

    The noise belongs to the token id, so the choice does not depend on which candidates were looked at.
    """

    name = "categorical"
    params = {"temperature": TEMPERATURE}
    pure = True

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> int64 [R]."""
        if batch.all_equal("temperature", 0.0):
            return logits.argmax(-1)
        drawn = _draw(logits, batch)
        if 0.0 in batch.values.get("temperature", {0.0}):
            drawn = logits.argmax(-1).where(batch["temperature"] == 0, drawn)
        return drawn


def _draw(logits: Tensor, batch: Batch) -> Tensor:
    window = _window(batch)
    if logits.device.type == "cpu" and 0 < window < logits.shape[1]:
        best, ids = logits.topk(window)
        if bool((best[:, -1] == -math.inf).all()):  # every candidate is in the window
            choice = (best + _gumbel(batch, ids)).argmax(-1, keepdim=True)
            return ids.gather(1, choice)[:, 0]
    return _draw_from_all(logits, batch)


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


def _window(batch: Batch) -> int:
    """How many candidates to try first; 0 when nothing truncates in some row."""
    top_k = batch.values.get("top_k", frozenset({0}))
    if 0 not in top_k:
        return 2 * max(k for k in top_k if isinstance(k, int))
    neutral = {"top_p": 1.0, "min_p": 0.0}
    truncated = any(value not in batch.values.get(name, frozenset({value})) for name, value in neutral.items())
    return _WINDOW if truncated else 0
