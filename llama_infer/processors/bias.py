"""Additive bias and plain bans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import ParameterError
from ..parts import Context, Param, Trait
from ..types import Value
from .penalties import IN_PLACE

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch, Column


def _is_bias(value: Mapping[int, float]) -> bool:
    return all(
        isinstance(token, int)
        and token >= 0
        and isinstance(bias, (int, float))
        and not math.isnan(bias)
        and bias != math.inf
        for token, bias in value.items()
    )


class LogitBias:
    """Adds a number to the logits of given tokens: ``logit_bias={token_id: bias}``; ``-inf`` bans the token.

    As OpenAI's API and vLLM have it, without the bound of 100.
    """

    name = "logit_bias"
    params = {
        "logit_bias": Param(
            default={},
            neutral={},
            check=_is_bias,
            range="token ids (integers from 0) to numbers, -inf included",
            help="added to the logits of these token ids",
        )
    }
    traits: frozenset[Trait] = frozenset({"pure", "row_independent"})

    def __init__(self) -> None:
        self._vocab_size: int | None = None

    def bind(self, context: Context) -> LogitBias:
        """Learns how many tokens there are, to refuse ids beyond them."""
        bound = LogitBias()
        bound._vocab_size = context.vocab_size
        return bound

    def prepare(self, name: str, values: Sequence[Value]) -> Column:
        """float64 [R, 2K]: id, bias, id, bias, ...; the padding adds 0 to token 0."""
        import torch

        from ..batch import Padded

        if self._vocab_size is not None:
            for token in (token for value in values for token in value if token >= self._vocab_size):
                raise ParameterError(f"logit_bias: token {token} is not in the vocabulary of {self._vocab_size}")
        pairs = [[number for pair in value.items() for number in pair] for value in values]
        return Padded.of(pairs, fill=0, dtype=torch.float64)

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        pairs = batch["logit_bias"].unflatten(1, (-1, 2))
        return logits.scatter_add(1, pairs[:, :, 0].long(), pairs[:, :, 1].to(logits.dtype))


class MinNewTokens:
    """Bans the end tokens until ``min_new_tokens`` have been generated (transformers' MinNewTokensLength).

    0 <= min_new_tokens; 0 is neutral.
    """

    name = "min_new_tokens"
    params = {
        "min_new_tokens": Param(
            default=0,
            neutral=0,
            check=lambda v: v >= 0,
            range="min_new_tokens >= 0",
            help="no end token before that many tokens",
        )
    }
    traits = IN_PLACE

    def __init__(self, end_token_ids: Sequence[int] = ()) -> None:
        self.end_token_ids = tuple(end_token_ids)

    def bind(self, context: Context) -> MinNewTokens:
        """Learns the end tokens."""
        return MinNewTokens(context.end_token_ids)

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        if not self.end_token_ids:
            return logits
        early = batch.length - batch.prompt_length < batch["min_new_tokens"]
        for end in self.end_token_ids:  # a few; a list as an index would be copied to the device
            logits[:, end].masked_fill_(early, -math.inf)
        return logits
