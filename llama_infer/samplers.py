"""Samplers: what chooses a token from the processed logits."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

from .parts import Param, Trait

if TYPE_CHECKING:
    from torch import Tensor

    from .batch import Batch
    from .candidates import Array, Candidates
    from .noise import Words

_STREAM = "categorical"
_ROUNDING = 2.0**-22
"""More than the share by which a float32 may differ from the 32 bits that it stands for."""


class Greedy:
    """The likeliest token; the lowest id among equals."""

    name = "greedy"
    traits: frozenset[Trait] = frozenset({"pure", "row_independent", "greedy_at_zero"})

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> int64 [R]."""
        from .rows import argmax

        return argmax(logits)


class Categorical:
    """Draws from softmax(logits) by the Gumbel trick: argmax of logits plus noise; greedy where temperature is 0.

    The noise belongs to the token id, so the choice does not depend on which candidates were looked at. 0 <=
    temperature, which the processor of that name divides by. Maddison, Tarlow, Minka 2014, arXiv 1411.0030.
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
        from .rows import argmax

        if batch.all_equal("temperature", 0.0):
            return argmax(logits)
        drawn = _draw_from_all(logits, batch)
        if 0.0 in batch.values.get("temperature", {0.0}):
            drawn = argmax(logits).where(batch["temperature"] == 0, drawn)
        return drawn

    def choose(self, candidates: Candidates, batch: Batch) -> Array:
        """The same on candidates: int64 [R], where in the window the choice is."""
        import numpy as np

        from .candidates import column

        scores = candidates.values
        if batch.all_equal("temperature", 0.0):
            return candidates.index_of_best(scores)
        noisy = _noisy(scores, candidates.ids, _keys(batch))
        if 0.0 in batch.values.get("temperature", {0.0}):
            noisy = np.where(column(batch, "temperature") == 0, scores, noisy)
        return candidates.index_of_best(noisy)


def _draw_from_all(logits: Tensor, batch: Batch) -> Tensor:
    import numpy as np
    import torch

    from . import noise
    from .rows import argmax, contenders

    if logits.device.type != "cpu":
        every_id = torch.arange(logits.shape[1], device=logits.device)
        return argmax(logits + noise.gumbel(batch.uniform(_STREAM, every_id)))
    keys = _keys(batch)
    ids = contenders(logits, keys)
    if ids is None:
        return torch.tensor([_draw(row, keys[at : at + 1]) for at, row in enumerate(logits)])
    rows = np.arange(len(ids))
    chosen = ids[rows, _noisy(logits.numpy()[rows[:, None], ids], ids, keys).argmax(-1)]
    for row in np.flatnonzero(chosen < 0):
        chosen[row] = _draw(logits[row], keys[row : row + 1])
    return torch.from_numpy(chosen)


def _noisy(scores: Array, ids: Array, keys: Words) -> Array:
    """Scores of the tokens ``ids``, both [R, K], plus the noise of the rows' streams [R]."""
    from . import noise

    return scores + noise.gumbel_of(noise.bits(keys[:, None], ids.view("uint64")))


def _draw(logits: Tensor, key: Words) -> int:
    """The largest of logits [V] plus noise, the noise turned into floats only where it may be the largest.

    The likeliest token and the one of the largest noise set a mark. What reaches it has either a noise that lifts even
    the likeliest token to it, or a logit that the largest noise lifts to it: both, or it cannot.
    """
    import numpy as np

    from . import noise

    def noisy(ids: Any) -> Any:
        return values[ids] + noise.gumbel_of(drawn[ids])

    drawn, values = noise.bits(key, _numbers(len(logits))), logits.numpy()
    likeliest, luckiest = int(values.argmax()), int(drawn.argmin())
    peak = float(values[likeliest])
    if not math.isfinite(peak):  # NaN and infinities are the chain's to find
        return int((values + noise.gumbel_of(drawn)).argmax())
    mark = float(noisy(np.array([likeliest, luckiest])).max())
    mark -= 1e-3 + 1e-6 * (abs(mark) + abs(peak))  # more than rounding can do
    largest_noise = float(noise.gumbel_of(drawn[luckiest : luckiest + 1])[0])
    # The noise falls as the fraction that it is made of grows: at least mark - peak up to this one.
    fraction = -math.expm1(-math.exp(min(peak - mark, 700.0)))
    able = (drawn <= np.uint64(min(fraction * (1 + _ROUNDING), 1.0) * 2.0**32)) & (values >= mark - largest_noise)
    ids = np.flatnonzero(able)
    return int(ids[noisy(ids).argmax()])


@cache
def _numbers(vocab_size: int) -> Words:
    """0, 1, 2, ..."""
    import numpy as np

    return np.arange(vocab_size, dtype=np.uint64)


def _keys(batch: Batch) -> Words:
    """The rows' streams, uint64 [R]."""
    from . import noise

    return noise.row_keys(batch.seed, batch.branch, batch.position, _STREAM)
