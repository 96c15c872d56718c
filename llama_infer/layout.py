"""Which token of a packed forward belongs to which row: the row map that the attention and the cache read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .transfer import upload

_CALL = 256
"""Tokens that an attention call on the CPU could serve in the time that calling takes."""


class Span(NamedTuple):
    """What one row feeds in a step: ``new`` tokens behind the ``old`` that the cache holds; ``ready`` when that is all
    of its known tokens, so that its last one yields logits."""

    old: int
    new: int
    ready: bool

    @property
    def end(self) -> int:
        """Tokens held after the step."""
        return self.old + self.new


class Piece(NamedTuple):
    """Rows ``first``..``last`` (exclusive) that are attended to together, from packed token ``start`` on.

    Either a run of neighbouring rows that feed one token each, or one row that feeds several.
    """

    first: int
    last: int
    start: int


@dataclass(frozen=True)
class Layout:
    """The tokens of all rows end to end. Built on the host; no tensor of it depends on a device's result.

    ``recorded``: the step is recorded, to be replayed with other numbers in :attr:`positions` and :attr:`ends`. The
    spans then say how far rows may reach, not how far they do.
    """

    spans: tuple[Span, ...]
    device: torch.device
    recorded: bool = False
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    _slots: dict[int, Tensor] = field(default_factory=dict)
    _elsewhere: dict[torch.device, Layout] = field(default_factory=dict)

    def on(self, device: torch.device) -> Layout:
        """The same on another device, for a model whose layers are on several."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Layout(self.spans, device)
        return self._elsewhere[device]

    @property
    def decodes(self) -> bool:
        """Whether every row feeds one token, its last."""
        return all(span.new == 1 and span.ready for span in self.spans)

    @cached_property
    def width(self) -> int:
        """The longest row after the step."""
        return max(span.end for span in self.spans)

    @cached_property
    def rows(self) -> Tensor:
        """int64 [N]: the row of each token."""
        return self._tensor([row for row, span in enumerate(self.spans) for _ in range(span.new)])

    @cached_property
    def positions(self) -> Tensor:
        """int64 [N]: the position of each token in its row."""
        return self._tensor([at for span in self.spans for at in range(span.old, span.end)])

    @cached_property
    def starts(self) -> Tensor:
        """int32 [R + 1]: where in the packed tokens each row begins, and where the last one ends."""
        return self._tensor([0, *accumulate(span.new for span in self.spans)]).int()

    @cached_property
    def ends(self) -> Tensor:
        """int32 [R]: how many tokens each row holds after the step."""
        return self._tensor([span.end for span in self.spans]).int()

    def slot_starts(self, capacity: int) -> Tensor:
        """int32 [R + 1]: where each row's slot begins when slots of that many tokens lie end to end."""
        if capacity not in self._slots:
            count = len(self.spans) + 1
            self._slots[capacity] = torch.arange(count, dtype=torch.int32, device=self.device) * capacity
        return self._slots[capacity]

    @cached_property
    def last(self) -> Tensor:
        """int64 [M]: where in the packed tokens the last one of each ready row stands."""
        ends, total = [], 0
        for span in self.spans:
            total += span.new
            if span.ready:
                ends.append(total - 1)
        return self._tensor(ends)

    @cached_property
    def ready(self) -> Tensor | None:
        """int64 [M]: the ready rows; None when all are."""
        rows = [row for row, span in enumerate(self.spans) if span.ready]
        return None if len(rows) == len(self.spans) else self._tensor(rows)

    @cached_property
    def singles(self) -> Tensor | None:
        """int64 [4, S]: the rows that feed one token, which of the packed tokens it is, how many they feed (1), and how
        many each then holds; None when there are none."""
        return self._where(lambda new: new == 1)

    @cached_property
    def several(self) -> Tensor | None:
        """The same of the rows that feed more."""
        return self._where(lambda new: new > 1)

    def _where(self, asked: Callable[[int], bool]) -> Tensor | None:
        starts = accumulate((span.new for span in self.spans), initial=0)
        rows = enumerate(zip(starts, self.spans, strict=False))  # the last start is the end
        found = [(row, start, span.new, span.end) for row, (start, span) in rows if asked(span.new)]
        return self._tensor(found).T.contiguous() if found else None

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The rows in groups that one attention call serves.

        On the CPU a group ends where more padding would cost more than a call and than a quarter of the work.
        """
        pieces: list[Piece] = []
        start, width, held, padding_is_free = 0, 0, 0, self.device.type != "cpu"
        for row, span in enumerate(self.spans):
            joins = span.new == 1 and bool(pieces) and pieces[-1].last == row and self.spans[row - 1].new == 1
            if joins and not padding_is_free:
                whole = held + span.end
                padding = (row + 1 - pieces[-1].first) * max(width, span.end) - whole
                joins = padding <= max(_CALL, whole // 4)
            if joins:
                pieces[-1] = pieces[-1]._replace(last=row + 1)
                width, held = max(width, span.end), held + span.end
            elif span.new:
                pieces.append(Piece(row, row + 1, start))
                width = held = span.end
            start += span.new
        return tuple(pieces)

    def mask(self, piece: Piece, window: int | None) -> Tensor | None:
        """bool [rows, 1, new, width of the piece]: what each token sees; None where it sees everything before it.

        ``window``: of that many positions, itself included, only (sliding window attention). Made once a step.
        """
        key = (piece.first, window)
        if key not in self._masks:
            self._masks[key] = self._mask(self.spans[piece.first : piece.last], window)
        return self._masks[key]

    def _mask(self, spans: Sequence[Span], window: int | None) -> Tensor | None:
        width = max(span.end for span in spans)
        window = width if window is None else window
        unbounded = window >= width
        if unbounded and (all(s.new == 1 and s.end == width for s in spans) or (len(spans) == 1 and not spans[0].old)):
            return None
        at = torch.stack([torch.arange(s.old, s.end) for s in spans]).to(self.device)[:, None, :, None]
        to = torch.arange(width, device=self.device)
        return (to <= at) if unbounded else (to <= at) & (to > at - window)

    def _tensor(self, values: Sequence[int] | Sequence[tuple[int, ...]]) -> Tensor:
        return upload(torch.tensor(values, dtype=torch.int64), self.device)
