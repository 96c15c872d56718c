"""Processors and a sampler as one callable, with the checks that keep a faulty part from spoiling a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .batch import Batch, Column
from .candidates import Candidates
from .errors import PartError
from .history import restored, together
from .parts import Context, LogitsProcessor, Sampler, Trait

NOTHING = -1
"""No token for this row in this step."""
EXCLUDED = -2
"""The row has no token: the chosen one's score is -inf, so nothing was left to choose from."""
NON_FINITE = -3
"""The row has no token: the chosen one's score is NaN or +inf."""
OUT_OF_RANGE = -4
"""The row has no token: the sampler chose an id that the vocabulary does not have."""
_FLOATS = (torch.float32, torch.float64)
_GUESS = 256
"""Candidates to look at when nobody knows how many will be left."""


class Choice(NamedTuple):
    """Tokens int64 [R] (below zero: one of this module's codes) and new values of state columns."""

    tokens: Tensor
    columns: Mapping[str, Column]


class _Stages(NamedTuple):
    """``head`` on all logits; ``tail`` on a window of so many tokens, 0 where there is none; who accepts the choice;
    whether the head may be lent the raw logits."""

    head: Sequence[LogitsProcessor]
    tail: Sequence[LogitsProcessor]
    accepting: Sequence[Any]
    window: int = 0
    lends: bool = False


class Chain:
    """Processors in their order, then a sampler.

    A processor is skipped while all of its parameters that have a neutral value have it in every row. The raw logits
    are never written to: a part that is not declared "pure" gets a copy of them. Where the end of the chain can be
    computed on a window of the likeliest tokens, it is (see :mod:`~llama_infer.candidates`); ``windows=False`` turns
    that off, which changes no choice.
    """

    def __init__(self, processors: Sequence[LogitsProcessor], sampler: Sampler, windows: bool = True) -> None:
        self.processors = tuple(processors)
        self.sampler = sampler
        self.windows = windows
        self._memo: tuple[Mapping[str, Any], _Stages] | None = None

    @property
    def parts(self) -> tuple[Any, ...]:
        """Every part, in order."""
        return (*self.processors, self.sampler)

    def bind(self, context: Context) -> Chain:
        """The chain for a loaded model."""
        bound = [part.bind(context) if hasattr(part, "bind") else part for part in self.parts]
        return Chain(bound[:-1], bound[-1], self.windows)

    def state(self, batch: Batch) -> dict[str, Column]:
        """The state columns of newly admitted rows."""
        columns: dict[str, Column] = {}
        for part in self.parts:
            if hasattr(part, "state"):
                columns.update(part.state(batch))
        return columns

    def scores(self, logits: Tensor, batch: Batch) -> Tensor:
        """The processed logits, float32 (float64 stays) [R, V]; the given ones are left as they are."""
        return _apply([part for part in self.processors if not _is_neutral(part, batch)], logits, batch)

    def __call__(self, logits: Tensor, batch: Batch) -> Choice:
        """Chooses a token in each row from raw logits [R, V]."""
        stages = self._stages(batch)
        if not stages.lends or not _is_writable(logits):
            return self._run(stages, logits, batch)
        with restored(logits, batch):
            return self._run(stages, logits, batch, writable=True)

    def _run(self, stages: _Stages, logits: Tensor, batch: Batch, writable: bool = False) -> Choice:
        scores = _apply(stages.head, logits, batch, writable)
        if stages.window:
            return Choice(self._choose(scores, batch, stages.tail, min(stages.window, logits.shape[1])), {})
        tokens = self._sample(scores, batch)
        columns: dict[str, Column] = {}
        for part in stages.accepting:
            columns.update(part.accept(scores, tokens.clamp(min=0), batch))
        return Choice(tokens, columns)

    def _stages(self, batch: Batch) -> _Stages:
        """What can change a choice, split into stages: neither neutral parts nor those that are idle because every row
        is greedy."""
        if self._memo is not None and self._memo[0] is batch.values:
            return self._memo[1]  # the same rows as in the last step
        greedy = "greedy_at_zero" in traits(self.sampler) and batch.all_equal("temperature", 0.0)
        idle = {"keeps_argmax"} if greedy else set()
        active = [part for part in self.processors if not _is_neutral(part, batch) and not idle & traits(part)]
        stages = _Stages(active, [], [part for part in (*active, self.sampler) if hasattr(part, "accept")])
        if self.windows and not stages.accepting and batch.device.type == "cpu":
            if hasattr(self.sampler, "choose") and any(_truncates(part) for part in active):
                head, tail = _split(active)
                stages = _Stages(head, tail, [], _window(tail, batch))
        first = next((part for part in stages.head if "pure" not in traits(part)), None)
        if not stages.accepting and "history_only" in traits(first) and batch.device.type == "cpu":
            stages = stages._replace(lends=True)
        stages = stages._replace(head=together(stages.head))
        self._memo = (batch.values, stages)
        return stages

    def _choose(self, logits: Tensor, batch: Batch, tail: Sequence[Any], window: int) -> Tensor:
        """The rest of the chain on a window; rows whose candidates it does not hold are done in full."""
        with np.errstate(all="ignore"):  # NaN and infinities are found at the end
            candidates = Candidates.of(logits, window)
            for part in tail:
                candidates = part.narrow(candidates, batch)
            index = self.sampler.choose(candidates, batch)  # type: ignore[attr-defined]
            at = np.arange(len(index)), index
            ids, chosen = candidates.ids[at], candidates.values[at]
            known = (candidates.fits & candidates.complete)[:, 0]
        coded = _code(torch.from_numpy(ids), torch.from_numpy(chosen))
        if known.all():
            return coded
        rows = torch.from_numpy(np.flatnonzero(~known))
        some = batch.select(rows)
        return coded.scatter(0, rows, self._sample(_apply(tail, logits[rows], some), some))

    def _sample(self, scores: Tensor, batch: Batch) -> Tensor:
        """The sampler's choice or a code in each row."""
        if "row_independent" in traits(self.sampler):
            given = scores if "pure" in traits(self.sampler) else scores.clone()
            return _code_failures(self._checked(self.sampler(given, batch), scores, batch), scores)
        # A row that cannot be sampled from must not bring down a sampler that looks at all rows at once.
        peak = scores.amax(-1)
        sound = scores.masked_fill(~peak.isfinite()[:, None], 0.0)
        coded = _code_failures(self._checked(self.sampler(sound.clone(), batch), scores, batch), sound)
        return _code(coded, peak)

    def _checked(self, tokens: Any, scores: Tensor, batch: Batch) -> Tensor:
        if not isinstance(tokens, Tensor) or tokens.shape != batch.length.shape or tokens.dtype != torch.int64:
            raise PartError(
                f"sampler {part_name(self.sampler)} returned {_describe(tokens)}; "
                f"a sampler returns an int64 tensor of shape [{len(batch)}]: a token id for each row"
            )
        if tokens.device != scores.device:
            raise PartError(
                f"sampler {part_name(self.sampler)} returned a tensor on {tokens.device}; expected {scores.device}"
            )
        return tokens


def traits(part: Any) -> frozenset[Trait]:
    """What a part promises."""
    return getattr(part, "traits", frozenset())


def part_name(part: Any) -> str:
    """How messages and ``repr`` call a part."""
    name = getattr(part, "name", None) or getattr(part, "__name__", None)
    return name if isinstance(name, str) else type(part).__name__


def _is_writable(logits: Tensor) -> bool:
    return logits.dtype in _FLOATS and logits.is_contiguous() and not logits.is_inference()


def _apply(parts: Sequence[Any], logits: Tensor, batch: Batch, writable: bool = False) -> Tensor:
    """The parts one after another; the given logits stay as they are, unless ``writable`` at the history's tokens."""
    scores = logits if logits.dtype in _FLOATS else logits.float()
    for part in parts:
        lent = writable and "history_only" in traits(part)
        given = scores.clone() if scores is logits and not lent and "pure" not in traits(part) else scores
        scores = part(given, batch)
        _check_like(part, scores, given)
    return scores


def _split(active: Sequence[LogitsProcessor]) -> tuple[Sequence[LogitsProcessor], Sequence[LogitsProcessor]]:
    """What must see all logits, and the end that can be computed on candidates."""
    start = len(active)
    while start and hasattr(active[start - 1], "narrow"):
        start -= 1
    return active[:start], active[start:]


def _truncates(part: Any) -> bool:
    """Whether the part may leave so few tokens that a window holds them."""
    return bool(getattr(part, "truncates", hasattr(part, "narrow")))


def _window(tail: Sequence[Any], batch: Batch) -> int:
    """How many candidates to look at: what the parts know to be enough, else a guess."""
    known = [part.window(batch) for part in tail if hasattr(part, "window")]
    return min((count for count in known if count), default=_GUESS)


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
    if tokens.device.type == "cpu":  # a look costs nothing, and nearly always finds nothing
        ids = tokens.numpy()
        if ((ids >= 0) & (ids < scores.shape[1])).all():
            return _code(tokens, torch.from_numpy(scores.numpy()[np.arange(len(ids)), ids]))
    valid = tokens.clamp(0, scores.shape[1] - 1)
    return torch.where(valid != tokens, OUT_OF_RANGE, _code(tokens, scores.gather(1, valid[:, None])[:, 0]))


def _code(tokens: Tensor, chosen: Tensor) -> Tensor:
    """The tokens, or a code where the ``chosen`` score of one is not finite."""
    if tokens.device.type == "cpu" and np.isfinite(chosen.numpy()).all():
        return tokens
    coded = torch.where(chosen == -torch.inf, EXCLUDED, tokens)
    return torch.where(chosen.isnan() | (chosen == torch.inf), NON_FINITE, coded)


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
