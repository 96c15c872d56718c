"""A budget for thinking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ParameterError
from ..parts import Context, Param
from ..types import Value
from .bans import are_tokens, check_vocabulary, encode, force
from .penalties import IN_PLACE, NO_TOKEN, last_tokens, numbers

if TYPE_CHECKING:
    from torch import Tensor

    from ..batch import Batch, Column


def _is_marker(value: Sequence[Any]) -> bool:
    text = len(value) == 1 and isinstance(value[0], str) and value[0] != ""
    return text or (len(value) > 0 and are_tokens(tuple(value)))


class ReasoningBudget:
    """Ends thinking: once ``reasoning_budget`` tokens were generated inside of an open span, the tokens of
    ``reasoning_end`` are forced, one a step.

    A span is open when ``reasoning_start`` has occurred, in the answer or in the prompt (templates often end with it),
    and ``reasoning_end`` not after it. Only generated tokens count against the budget, and each span has all of it. An
    end that the model has begun by itself is completed, not begun anew. As vLLM's and llama.cpp's options of this name.
    Parameters:

    reasoning_budget: tokens; 0 ends thinking at once, -1 is neutral.
    reasoning_start, reasoning_end: a string, which the tokenizer makes tokens of, or token ids; they must differ. They
    are found as exactly these tokens: best where they are tokens of their own, as in models made to think.
    """

    name = "reasoning_budget"
    params = {
        "reasoning_budget": Param(
            default=-1,
            neutral=-1,
            check=lambda v: v >= -1,
            range="reasoning_budget >= -1",
            help="thinking ends after that many tokens; -1: no limit",
        ),
        "reasoning_start": Param(
            default=("<think>",),
            check=_is_marker,
            range="a non-empty string or token ids",
            help="what begins thinking",
        ),
        "reasoning_end": Param(
            default=("</think>",),
            check=_is_marker,
            range="a non-empty string or token ids",
            help="what ends thinking",
        ),
    }
    traits = IN_PLACE

    def __init__(self, context: Context | None = None) -> None:
        self._context = context

    def bind(self, context: Context) -> ReasoningBudget:
        """Learns the tokenizer and how many tokens there are."""
        return ReasoningBudget(context)

    def prepare(self, name: str, values: Sequence[Value]) -> Column:
        """The budget as it is; of the markers int64 [R, K], filled up with -1 (all of it where it is unknown)."""
        from ..batch import Padded

        if name == "reasoning_budget":
            return numbers(values)
        rows = [self._tokens(name, value) for value in values]
        for row in rows:
            check_vocabulary(name, row, self._context)
        return Padded.of(rows)

    def check(self, params: Mapping[str, Value]) -> None:
        """Refuses markers given as text where there is no tokenizer to make tokens of them."""
        if self._context is not None and self._context.tokenizer is not None:
            return
        for name in ("reasoning_start", "reasoning_end"):
            if isinstance(params[name][0], str):
                raise ParameterError(
                    f"{name}={params[name][0]!r} is a string and there is no tokenizer for it: give token ids"
                )

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """[R, V] -> [R, V], in place."""
        import torch

        begin, end = batch["reasoning_start"], batch["reasoning_end"]
        if 0 in (batch.width, begin.shape[1], end.shape[1]):
            return logits
        started, ended = _after_last(batch.tokens, begin), _after_last(batch.tokens, end)
        inside = batch.length - torch.maximum(started, batch.prompt_length)
        budget = batch["reasoning_budget"]
        forced = (started > ended) & (budget >= 0) & (inside >= budget)
        done = _matched_prefix(batch.tokens, batch.length, end, batch.length - started)
        return force(logits, end.gather(1, done[:, None])[:, 0], forced)

    def _tokens(self, name: str, value: Sequence[Any]) -> tuple[int, ...]:
        if not isinstance(value[0], str):
            return tuple(value)
        known = self._context is not None and self._context.tokenizer is not None
        # Unknown only matters to rows with a budget, see check().
        return encode(name, value[0], self._context) if known else ()


def _after_last(tokens: Tensor, marker: Tensor) -> Tensor:
    """int64 [R]: the position behind the last occurrence of each row's marker [R, K] in its tokens [R, T], else 0."""
    import torch

    size = (marker >= 0).sum(1, keepdim=True)
    found = (tokens >= 0) & (size > 0) & (size <= tokens.shape[1])
    for back in range(min(marker.shape[1], tokens.shape[1])):
        # Of a marker of k tokens, number k - 1 - back stands that far before its last.
        wanted = marker.gather(1, (size - 1 - back).clamp(min=0))
        unasked = size <= back
        found[:, :back] &= unasked
        found[:, back:] &= (tokens[:, : tokens.shape[1] - back] == wanted) | unasked
    at = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return at.where(found, 0).amax(1)


def _matched_prefix(tokens: Tensor, length: Tensor, marker: Tensor, limit: Tensor) -> Tensor:
    """int64 [R]: how many of the last tokens are the marker's first ones, short of all of it, at most ``limit``."""
    import torch

    longest = marker.shape[1]
    size = (marker >= 0).sum(1)
    matched = torch.zeros_like(length)
    last = last_tokens(tokens, length, longest)
    for count in range(1, longest):
        same = (last[:, :count].flip(1) == marker[:, :count]).all(1) & (last[:, count - 1] != NO_TOKEN)
        matched = matched.masked_fill(same & (count < size) & (count <= limit), count)
    return matched
