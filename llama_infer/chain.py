"""Processors and a sampler as one callable, with the checks that keep a faulty part from spoiling a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import Batch, Column
from .errors import PartError
from .parts import Context, LogitsProcessor, Sampler

NOTHING = -1
"""No token for this row in this step."""
EXCLUDED = -2
"""The row has no token: the chosen one's score is -inf, so nothing was left to choose from."""
NON_FINITE = -3
"""The row has no token: the chosen one's score is NaN or +inf."""
OUT_OF_RANGE = -4
"""The row has no token: the sampler chose an id that the vocabulary does not have."""


class Choice(NamedTuple):
    """Tokens int64 [R] (below zero: one of this module's codes) and new values of state columns."""

    tokens: Tensor
    columns: Mapping[str, Column]


class Chain:
    """Processors in their order, then a sampler.

    A processor is skipped while all of its parameters that have a neutral value have it in every row. The raw logits
    are never written to: a part that is not declared ``pure`` gets a copy of them.
    """

    def __init__(self, processors: Sequence[LogitsProcessor], sampler: Sampler) -> None:
        self.processors = tuple(processors)
        self.sampler = sampler

    @property
    def parts(self) -> tuple[Any, ...]:
        """Every part, in order."""
        return (*self.processors, self.sampler)

    def bind(self, context: Context) -> Chain:
        """The chain for a loaded model."""
        bound = [part.bind(context) if hasattr(part, "bind") else part for part in self.parts]
        return Chain(bound[:-1], bound[-1])

    def state(self, batch: Batch) -> dict[str, Column]:
        """The state columns of newly admitted rows."""
        columns: dict[str, Column] = {}
        for part in self.parts:
            if hasattr(part, "state"):
                columns.update(part.state(batch))
        return columns

    def scores(self, logits: Tensor, batch: Batch) -> Tensor:
        """The processed logits, float32 (float64 stays) [R, V]; the given ones are left as they are."""
        scores = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        for part in self.processors:
            if _is_neutral(part, batch):
                continue
            given = scores.clone() if scores is logits and not getattr(part, "pure", False) else scores
            scores = part(given, batch)
            _check_like(part, scores, given)
        return scores

    def __call__(self, logits: Tensor, batch: Batch) -> Choice:
        """Chooses a token in each row from raw logits [R, V]."""
        scores = self.scores(logits, batch)
        pure = scores is not logits or getattr(self.sampler, "pure", False)
        tokens = self.sampler(scores if pure else scores.clone(), batch)
        if not isinstance(tokens, Tensor) or tokens.shape != batch.length.shape or tokens.dtype != torch.int64:
            raise PartError(
                f"sampler {part_name(self.sampler)} returned {_describe(tokens)}; "
                f"a sampler returns an int64 tensor of shape [{len(batch)}]: a token id for each row"
            )
        if tokens.device != scores.device:
            raise PartError(
                f"sampler {part_name(self.sampler)} returned a tensor on {tokens.device}; expected {scores.device}"
            )
        columns: dict[str, Column] = {}
        for part in self.parts:
            if hasattr(part, "accept"):
                columns.update(part.accept(scores, tokens, batch))
        return Choice(_code_failures(tokens, scores), columns)


def part_name(part: Any) -> str:
    """How messages and ``repr`` call a part."""
    name = getattr(part, "name", None) or getattr(part, "__name__", None)
    return name if isinstance(name, str) else type(part).__name__


def _is_neutral(part: Any, batch: Batch) -> bool:
    neutrals = {name: param.neutral for name, param in getattr(part, "params", {}).items() if param.neutral is not None}
    return bool(neutrals) and all(batch.all_equal(name, hashable(neutral)) for name, neutral in neutrals.items())


def hashable(value: Any) -> Any:
    """A value that sets can hold: mappings become tuples of their items."""
    if isinstance(value, Mapping):
        return tuple(sorted(value.items()))
    return tuple(map(hashable, value)) if isinstance(value, (tuple, list)) else value


def _code_failures(tokens: Tensor, scores: Tensor) -> Tensor:
    """The tokens, or a code where there is none. One look at the chosen scores tells all: argmax prefers NaN and +inf
    to anything else, and -inf to nothing."""
    valid = tokens.clamp(0, scores.shape[1] - 1)
    chosen = scores.gather(1, valid[:, None])[:, 0]
    coded = torch.where(chosen == -torch.inf, EXCLUDED, tokens)
    coded = torch.where(chosen.isnan() | (chosen == torch.inf), NON_FINITE, coded)
    return torch.where(valid != tokens, OUT_OF_RANGE, coded)


def _check_like(part: Any, returned: Any, given: Tensor) -> None:
    if (
        isinstance(returned, Tensor)
        and returned.shape == given.shape
        and returned.dtype == given.dtype
        and returned.device == given.device
    ):
        return
    raise PartError(
        f"processor {part_name(part)} returned {_describe(returned)}; it was given {_describe(given)} and must return "
        "logits of the same shape, dtype and device"
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    return f"a {type(value).__name__}"
