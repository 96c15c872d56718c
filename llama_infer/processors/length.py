"""A push towards the end of long answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..parts import Context, Param
from ..types import Value
from .penalties import IN_PLACE

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch, Column

_NEVER = 1 << 40
_LARGEST = 1e30


def _is_decay(value: Sequence[Any]) -> bool:
    if not value:
        return True
    if len(value) != 2 or any(isinstance(item, bool) or not isinstance(item, (int, float)) for item in value):
        return False
    start, factor = value
    return start >= 0 and float(start).is_integer() and 0 < factor < math.inf


class ExponentialDecayLengthPenalty:
    """Raises the end tokens' logits exponentially: ``logit + |logit| * (factor ** (generated - start) - 1)`` once more
    than ``start`` tokens have been generated.

    exponential_decay_length_penalty: ``(start, factor)``, start >= 0, factor > 0; above 1 ends answers sooner, below 1
    later. Neutral: ``()``. As transformers' class of this name; a logit of exactly 0 or -inf stays as it is there too.
    """

    name = "exponential_decay_length_penalty"
    params = {
        "exponential_decay_length_penalty": Param(
            default=(),
            neutral=(),
            check=_is_decay,
            range="(start, factor) with an integer start >= 0 and 0 < factor < inf, or ()",
            help="after start tokens, end tokens become likelier by this factor a token",
        )
    }
    traits = IN_PLACE

    def __init__(self, end_token_ids: Sequence[int] = ()) -> None:
        self.end_token_ids = tuple(dict.fromkeys(end_token_ids))

    def bind(self, context: Context) -> ExponentialDecayLengthPenalty:
        """Learns the end tokens."""
        return ExponentialDecayLengthPenalty(context.end_token_ids)

    def prepare(self, name: str, values: Sequence[Value]) -> Column:
        """float64 [R, 2]: start and factor."""
        import torch

        pairs = [list(value) or [_NEVER, 1.0] for value in values]
        return torch.tensor(pairs, dtype=torch.float64).reshape(len(values), 2)

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        if not self.end_token_ids:
            return logits
        start, factor = batch["exponential_decay_length_penalty"].unbind(1)
        late = (batch.length - batch.prompt_length - start).clamp(min=0)
        growth = (factor**late - 1).clamp(max=_LARGEST).to(logits.dtype)
        for end in self.end_token_ids:  # a few; a list as an index would be copied to the device
            scores = logits[:, end]
            raised = scores + (scores.abs() * growth).clamp(max=_LARGEST)
            logits[:, end] = raised.where(scores.isfinite(), scores)
        return logits
