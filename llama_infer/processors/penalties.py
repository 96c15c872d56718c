"""Penalties on tokens that have occurred."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..parts import Param, Trait

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch


class RepetitionPenalty:
    """Divides positive logits of every token in the context by the penalty and multiplies negative ones.

    Prompt and answer count, as in transformers. Keskar et al. 2019, arXiv 1909.05858.
    """

    name = "repetition_penalty"
    params = {
        "repetition_penalty": Param(
            default=1.0,
            neutral=1.0,
            check=lambda v: 0 < v < math.inf,
            range="0 < repetition_penalty < inf",
            help="above 1 discourages tokens of the prompt and the answer",
        )
    }
    traits: frozenset[Trait] = frozenset({"pure", "row_independent"})

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        if batch.width == 0:
            return logits
        penalty = batch["repetition_penalty"].to(logits.dtype)[:, None]
        ids = _without_padding(batch)
        scores = logits.gather(1, ids)
        penalised = (scores * penalty).where(scores < 0, scores / penalty)
        # A token gives the same value at each of its occurrences, so their order does not matter.
        return logits.scatter(1, ids, penalised.where((batch.length > 0)[:, None], scores))


def _without_padding(batch: Batch) -> Tensor:
    """Token ids [R, width] with the row's first token in place of the padding."""
    tokens = batch.tokens
    return tokens.where(tokens >= 0, tokens[:, :1].clamp(min=0))


class PresencePenalty:
    """Subtracts the penalty once from the logit of each token that the answer has (OpenAI, vLLM; not the prompt)."""

    name = "presence_penalty"
    params = {
        "presence_penalty": Param(
            default=0.0,
            neutral=0.0,
            check=math.isfinite,
            range="a finite number",
            help="subtracted from the logits of tokens in the answer",
        )
    }
    traits: frozenset[Trait] = frozenset({"pure", "row_independent"})

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        import torch

        penalty = batch["presence_penalty"].to(logits.dtype)[:, None]
        present = _generated_counts(logits, batch) > 0
        return torch.where(present, logits - penalty, logits)


class FrequencyPenalty:
    """Subtracts the penalty from a token's logit once for each time that the answer has it (OpenAI, vLLM)."""

    name = "frequency_penalty"
    params = {
        "frequency_penalty": Param(
            default=0.0,
            neutral=0.0,
            check=math.isfinite,
            range="a finite number",
            help="subtracted for each occurrence in the answer",
        )
    }
    traits: frozenset[Trait] = frozenset({"pure", "row_independent"})

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V]."""
        penalty = batch["frequency_penalty"].to(logits.dtype)[:, None]
        return logits - penalty * _generated_counts(logits, batch)


def _generated_counts(logits: Tensor, batch: Batch) -> Tensor:
    """How often the answer has each token, [R, V] in the logits' dtype."""
    import torch

    weight = batch.generated().to(logits.dtype)
    return torch.zeros_like(logits).scatter_add(1, batch.tokens.clamp(min=0), weight)
