"""Penalties on tokens that have occurred, and what parts that read the history share.

The work goes by the history's positions, never by the vocabulary (see :mod:`~llama_infer.history`), and in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..history import Change, HistoryPenalty
from ..parts import Param, Trait
from ..types import Value

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..batch import Batch

IN_PLACE: frozenset[Trait] = frozenset({"row_independent"})
"""The traits of a part that writes into the logits that it is given."""
NO_TOKEN = -2
"""What :func:`last_tokens` has where a row is too short; differs from every token and from the table's padding."""


class RepetitionPenalty(HistoryPenalty):
    """Divides the logits of tokens in the context by the penalty where positive and multiplies them where negative.

    A token counts once, however often it occurs; prompt and answer count, as in transformers. Keskar et al. 2019,
    arXiv 1909.05858. Parameters:

    repetition_penalty: above 0; above 1 discourages, below 1 encourages; 1 is neutral.
    penalty_last_n: how many of the last tokens count (llama.cpp's ``repeat_last_n``): -1 all of them, 0 none. It has no
    neutral value of its own.
    """

    name = "repetition_penalty"
    params = {
        "repetition_penalty": Param(
            default=1.0,
            neutral=1.0,
            check=lambda v: 0 < v < math.inf,
            range="0 < repetition_penalty < inf",
            help="above 1 discourages tokens of the prompt and the answer",
        ),
        "penalty_last_n": Param(
            default=-1,
            check=lambda v: v >= -1,
            range="penalty_last_n >= -1",
            help="how many of the last tokens repetition_penalty looks at; -1: all of them",
        ),
    }

    def change(self, batch: Batch) -> Change:
        """Of all tokens, or the last ``penalty_last_n``."""
        first = None
        if not batch.all_equal("penalty_last_n", -1):
            last = batch["penalty_last_n"]
            first = (batch.length - last).clamp_(min=0).masked_fill_(last < 0, 0)
        return Change("scale", batch["repetition_penalty"], first)


class PresencePenalty(HistoryPenalty):
    """Subtracts the penalty once from the logit of each token that the answer has (OpenAI, vLLM; not the prompt).

    presence_penalty: any finite number; 0 is neutral, below 0 encourages.
    """

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

    def change(self, batch: Batch) -> Change:
        """Of the answer's tokens, once."""
        return Change("lower", batch["presence_penalty"], batch.prompt_length)


class FrequencyPenalty(HistoryPenalty):
    """Subtracts the penalty from a token's logit once for each time that the answer has it (OpenAI, vLLM).

    frequency_penalty: any finite number; 0 is neutral, below 0 encourages.
    """

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

    def change(self, batch: Batch) -> Change:
        """Of the answer's tokens, each time."""
        return Change("lower_each", batch["frequency_penalty"], batch.prompt_length)


def within_last(batch: Batch, name: str) -> Tensor | None:
    """bool [R, width]: true at the last ``n`` tokens of each row, the parameter ``name`` being n; below 0: at all.

    None where the host knows that every row wants all.
    """
    if batch.all_equal(name, -1):
        return None
    import torch

    last = batch[name]
    start = (batch.length - last).masked_fill(last < 0, 0)[:, None]
    at = torch.arange(batch.width, device=batch.device)[None]
    return (at >= start) & (at < batch.length[:, None])


def last_tokens(tokens: Tensor, length: Tensor, count: int) -> Tensor:
    """int64 [R, count]: of ``tokens`` [R, T] the last one of each row, the one before, ...; NO_TOKEN where none is.

    Tokens below zero count as none.
    """
    import torch

    if tokens.shape[1] == 0:
        return tokens.new_full((tokens.shape[0], count), NO_TOKEN)
    at = length[:, None] - 1 - torch.arange(count, device=tokens.device)
    found = tokens.gather(1, at.clamp(min=0))
    return found.masked_fill((at < 0) | (found < 0), NO_TOKEN)


def numbers(values: Sequence[Value]) -> Tensor:
    """The column of a plain number, for parts that prepare some of their parameters themselves."""
    import torch

    dtype: torch.dtype = torch.float64 if any(isinstance(value, float) for value in values) else torch.int64
    return torch.tensor(list(values), dtype=dtype)


def largest(batch: Batch, name: str) -> int:
    """An upper bound of an integer parameter, without asking the device where the host knows it."""
    known = [value for value in batch.values.get(name, ()) if isinstance(value, int)]
    return max(known) if known else int(batch[name].max())
