"""Penalties on tokens that have occurred, and what parts that read the history share.

The work goes by the history's positions, never by the vocabulary: scores are gathered at the known tokens, changed, and
written back in place, into the copy of the logits that the chain hands to a part which is not "pure".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..parts import Param, Trait
from ..types import Value

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..batch import Batch
    from ..candidates import Array

IN_PLACE: frozenset[Trait] = frozenset({"row_independent"})
"""The traits of a part that writes into the logits that it is given."""
HISTORY_ONLY: frozenset[Trait] = IN_PLACE | {"history_only"}
"""The traits of one that writes at the tokens of the history only."""
_FEW = 8
NO_TOKEN = -2
"""What :func:`last_tokens` has where a row is too short; differs from every token and from the table's padding."""


class RepetitionPenalty:
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
    traits = HISTORY_ONLY

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        if batch.width == 0:
            return logits
        if _are_few(logits):
            return _by_row(_discourage, logits, batch, self.name, batch["penalty_last_n"].tolist())
        penalty = batch["repetition_penalty"].to(logits.dtype)
        counted = within_last(batch, "penalty_last_n")
        if counted is None:
            counted, none = batch.tokens >= 0, batch.length == 0
        else:
            none = (batch.length == 0) | (batch["penalty_last_n"] == 0)
        penalty = penalty.masked_fill(none, 1.0)[:, None]
        ids = _only(batch, counted)
        scores = logits.gather(1, ids)
        # A token gives the same value at each of its occurrences, so their order does not matter.
        return logits.scatter_(1, ids, (scores * penalty).where(scores < 0, scores / penalty))


class PresencePenalty:
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
    traits = HISTORY_ONLY

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        if batch.width == 0:
            return logits
        if _are_few(logits):
            return _by_row(_lower, logits, batch, self.name)
        penalty = batch["presence_penalty"].to(logits.dtype).masked_fill(batch.length <= batch.prompt_length, 0.0)
        ids = _only(batch, batch.generated())
        return logits.scatter_(1, ids, logits.gather(1, ids) - penalty[:, None])


class FrequencyPenalty:
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
    traits = HISTORY_ONLY

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        if batch.width == 0:
            return logits
        if _are_few(logits):
            return _by_row(_lower_each_time, logits, batch, self.name)
        penalty = batch["frequency_penalty"].to(logits.dtype)[:, None]
        return logits.scatter_add_(1, batch.tokens.clamp(min=0), -penalty * batch.generated())


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


def _only(batch: Batch, counted: Tensor) -> Tensor:
    """Token ids [R, width] with the row's last token in place of those that do not count.

    The last token counts wherever any does, so writing a function of a token's score at these ids repeats what is
    written anyway. Rows where none counts must write the score itself.
    """
    tokens = batch.tokens
    last = tokens.gather(1, (batch.length - 1).clamp(min=0)[:, None]).clamp(min=0)
    return tokens.where(counted, last)


def _are_few(logits: Tensor) -> bool:
    """Whether numpy is faster, row by row: at so few rows an operation of torch's is all overhead."""
    return logits.device.type == "cpu" and logits.shape[0] <= _FEW


def _by_row(
    change: Callable[[Array, Array, Any], None],
    logits: Tensor,
    batch: Batch,
    name: str,
    last: Sequence[int] | None = None,
) -> Tensor:
    """Calls ``change(row, ids, penalty)`` for each row, to write to its logits at the tokens that count: the ``last``
    so many (below 0: all); None: those of the answer. The penalty is the row's parameter ``name``."""
    import numpy as np

    lengths = batch.length.tolist()
    if last is None:
        firsts = batch.prompt_length.tolist()
    else:
        firsts = [0 if count < 0 else max(0, length - count) for count, length in zip(last, lengths, strict=True)]
    rows = zip(logits.numpy(), batch.tokens.numpy(), firsts, lengths, batch[name].numpy(), strict=True)
    with np.errstate(all="ignore"):
        for row, tokens, first, length, penalty in rows:
            change(row, tokens[first:length], penalty)
    return logits


def _discourage(row: Array, ids: Array, penalty: Any) -> None:
    import numpy as np

    scores = row[ids]
    row[ids] = np.where(scores < 0, scores * penalty, scores / penalty)


def _lower(row: Array, ids: Array, penalty: Any) -> None:
    row[ids] = row[ids] - penalty


def _lower_each_time(row: Array, ids: Array, penalty: Any) -> None:
    import numpy as np

    np.subtract.at(row, ids, penalty)
