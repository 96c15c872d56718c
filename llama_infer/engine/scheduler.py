"""Who may join, how much of each row is fed in a step, and who gives way when memory runs out."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Sequence

from ..layout import Span
from .sequence import LiveSequence, Task

WINDOW = 128
"""Requests that may overtake one another."""
UNLIMITED_ANSWER = 512
"""What an answer without ``max_new_tokens`` counts for; one that grows longer may have to give way."""
_LEAST_CHUNK = 64


class Scheduler:
    """Requests in windows of :data:`WINDOW`, in order; in a window those with the longest answers first, so that no
    long one is left to be decoded alone at the end.

    Args:
        batch_size: rows of the table. A request that needs more gets them when the table is empty.
        tokens: rows times the longest that they may come to be. A request that needs more gets it when the table is
            empty.
        chunk: prompt tokens fed in a step while other rows decode, so that those do not stall.
        idle_chunk: prompt tokens fed in a step when no row decodes; bounds the memory of activations.
        together: rows that have to be free before waiting requests join those that run, if so many wait: where a step
            that feeds prompts takes as long as many that do not.
    """

    def __init__(
        self,
        batch_size: int,
        tokens: float = math.inf,
        chunk: int = 512,
        idle_chunk: int = 512,
        together: int = 1,
    ) -> None:
        self.batch_size, self.tokens, self.chunk, self.idle_chunk = batch_size, tokens, chunk, idle_chunk
        self.together = together
        self._waiting: dict[str, Task] = {}
        self._order: list[tuple[int, int, int, Task]] = []  # a heap; may hold tasks that wait no more

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def add(self, task: Task) -> None:
        """Queues a task, new or preempted."""
        window = -1 if task.parked else task.number // WINDOW
        self._waiting[task.request.id] = task
        heapq.heappush(self._order, (window, -_answer(task), task.number, task))

    def cancel(self, id: str) -> Task | None:
        """Takes a waiting task out."""
        return self._waiting.pop(id, None)

    def admit(self, live: Sequence[LiveSequence]) -> list[Task]:
        """The tasks that join now. Each live task counts with all that it may come to hold."""
        if not self._waiting:
            self._order.clear()
            return []
        tasks = {sequence.task.number: sequence.task for sequence in live}
        rows = sum(task.width for task in tasks.values())
        longest = max(map(_length, tasks.values()), default=0)
        joining: list[Task] = []
        if tasks and self.batch_size - rows < min(self.together, len(self._waiting)):
            return joining
        while self._order:
            task = self._order[0][3]
            if self._waiting.get(task.request.id) is task:
                rows, longest = rows + task.width, max(longest, _length(task))
                if (rows > self.batch_size or rows * longest > self.tokens) and (tasks or joining):
                    break
                joining.append(self._waiting.pop(task.request.id))
            heapq.heappop(self._order)
        return joining

    def spans(self, live: Sequence[LiveSequence], held: Sequence[int], waiting: Collection[int] = ()) -> list[Span]:
        """What each row feeds, given how many tokens the cache holds of it; those ``waiting`` feed nothing."""
        missing = [sequence.known - old for sequence, old in zip(live, held, strict=True)]
        room = self.chunk if 1 in missing else self.idle_chunk
        spans = []
        for row, (old, lacking) in enumerate(zip(held, missing, strict=True)):
            new = lacking if lacking == 1 else 0 if row in waiting else min(lacking, room)
            room -= new if lacking > 1 else 0
            spans.append(Span(old, new, new == lacking))
        return spans

    def shrink(self, live: Sequence[LiveSequence]) -> set[int]:
        """Halves what runs at a time, for good. Returns the rows that stay: of whole tasks, the earliest ones, at most
        half of the rows; empty when a task that is alone has been fed in small chunks already."""
        tasks = {sequence.task.number: sequence.task for sequence in live}
        if len(tasks) < 2 and self.idle_chunk <= _LEAST_CHUNK:
            return set()
        self.idle_chunk = max(self.idle_chunk // 2, min(self.idle_chunk, _LEAST_CHUNK))
        self.chunk = min(self.chunk, self.idle_chunk)
        self.batch_size = max(1, len(live) // 2)
        self.tokens = min(self.tokens, self.batch_size * max(map(_length, tasks.values())))
        staying: set[int] = set()
        for number in sorted(tasks):
            rows = {row for row, sequence in enumerate(live) if sequence.task.number == number}
            if staying and len(staying) + len(rows) > self.batch_size:
                break
            staying |= rows
        return staying


def _answer(task: Task) -> int:
    limit = task.params.get("max_new_tokens")
    return UNLIMITED_ANSWER if limit is None else int(limit)


def _length(task: Task) -> int:
    """Tokens that a row of a task may come to hold."""
    return len(task.prompt_token_ids) + _answer(task)
