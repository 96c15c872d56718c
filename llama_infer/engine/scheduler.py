"""Who may join, and how much of each row is fed in a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from ..layout import Span
from .sequence import LiveSequence, Task


class Scheduler:
    """First come, first served, as far as there are rows.

    Args:
        batch_size: rows of the table. A request that needs more gets them when the table is empty.
        chunk: prompt tokens fed in a step while other rows decode, so that those do not stall.
        idle_chunk: prompt tokens fed in a step when no row decodes; bounds the memory of activations.
    """

    def __init__(self, batch_size: int, chunk: int = 512, idle_chunk: int = 4096) -> None:
        self.batch_size, self.chunk, self.idle_chunk = batch_size, chunk, idle_chunk
        self.waiting: deque[Task] = deque()

    def admit(self, live: Sequence[LiveSequence]) -> list[Task]:
        """The tasks that join now. Each live task counts with all rows that it may come to hold."""
        tasks = {sequence.task.number: sequence.task for sequence in live}
        used = sum(task.width for task in tasks.values())
        joining: list[Task] = []
        while self.waiting and (used + self.waiting[0].width <= self.batch_size or not used):
            joining.append(self.waiting.popleft())
            used += joining[-1].width
        return joining

    def spans(self, live: Sequence[LiveSequence], held: Sequence[int], waiting: Collection[int] = ()) -> list[Span]:
        """What each row feeds, given how many tokens the cache holds of it; those ``waiting`` feed nothing."""
        room = self.chunk if any(sequence.token_ids for sequence in live) else self.idle_chunk
        spans = []
        for row, (sequence, old) in enumerate(zip(live, held, strict=True)):
            lacking = sequence.known - old
            new = lacking if lacking == 1 else 0 if row in waiting else min(lacking, room)
            room -= new if lacking > 1 else 0
            spans.append(Span(old, new, new == lacking))
        return spans
