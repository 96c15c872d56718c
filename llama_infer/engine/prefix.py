"""Keys and values of earlier prompts and answers, for prompts that begin alike: each beginning is fed once.

Positions are absolute, so only what stands at the very beginning of a prompt can be taken over. Tokens are compared in
blocks of sixteen; a block is known by its tokens and the block before it, never by a hash alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .memory import is_out_of_memory
from .sequence import LiveSequence

BLOCK = 16
"""Tokens that are compared at a time."""
RUN = 256
"""Tokens that are kept, and forgotten, at a time at most."""

Key = tuple[int, tuple[int, ...]]
"""The number of the block before and the block's tokens."""


@dataclass(eq=False)
class _Run:
    """Consecutive blocks in one piece of memory."""

    kept: Any
    tokens: int
    blocks: list[Key]


class _Block(NamedTuple):
    number: int
    run: _Run


class Match(NamedTuple):
    """How a prompt begins like something known: pieces of memory with the tokens to take of each, their sum, and the
    key of the first block that is not known (None when no whole block is left)."""

    pieces: list[tuple[Any, int]]
    tokens: int
    frontier: Key | None


class PrefixCache:
    """A tree of token blocks, bounded, least recently used out. Belongs to one pipeline; used under the model's lock.

    Args:
        capacity: tokens kept at most.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens = 0
        self._blocks: dict[Key, _Block] = {}
        self._runs: OrderedDict[_Run, None] = (
            OrderedDict()
        )  # the least recently used first; what a run continues comes behind it
        self._count = 0

    def match(self, tokens: Sequence[int]) -> Match:
        """The longest known beginning."""
        blocks = self._walk(tokens)
        taken: dict[_Run, int] = {}
        for block in blocks:
            taken[block.run] = taken.get(block.run, 0) + BLOCK
        self._renew(list(taken))
        held = BLOCK * len(blocks)
        rest = tuple(tokens[held : held + BLOCK])
        return Match(
            [(run.kept, count) for run, count in taken.items()],
            held,
            (_last(blocks), rest) if len(rest) == BLOCK else None,
        )

    def keep(self, tokens: Sequence[int], copy: Callable[[int, int], Any]) -> None:
        """Adds what is not known yet of a sequence; ``copy(start, end)`` brings the keys and values of its tokens."""
        blocks = self._walk(tokens)
        runs = list(dict.fromkeys(block.run for block in blocks))
        self._renew(runs)
        room = self.capacity - sum(run.tokens for run in runs)
        whole = len(tokens) // BLOCK * BLOCK
        before = _last(blocks)
        for start in range(BLOCK * len(blocks), whole, RUN):
            end = min(start + RUN, whole)
            room -= end - start
            if room < 0:
                break
            while self.tokens + end - start > self.capacity:
                self._forget(next(iter(self._runs)))
            run = _Run(copy(start, end), end - start, [])
            for at in range(start, end, BLOCK):
                self._count += 1
                key = (before, tuple(tokens[at : at + BLOCK]))
                self._blocks[key] = _Block(self._count, run)
                run.blocks.append(key)
                before = self._count
            self._runs[run] = None
            self.tokens += run.tokens
            runs.append(run)
        self._renew(runs)

    def clear(self) -> None:
        """Forgets everything."""
        self._blocks.clear()
        self._runs.clear()
        self.tokens = 0

    def _walk(self, tokens: Sequence[int]) -> list[_Block]:
        blocks: list[_Block] = []
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            block = self._blocks.get((_last(blocks), tuple(tokens[start : start + BLOCK])))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _renew(self, runs: Sequence[_Run]) -> None:
        """Makes runs, given in order, the most recently used, what others continue last."""
        for run in reversed(runs):
            self._runs.move_to_end(run)

    def _forget(self, run: _Run) -> None:
        del self._runs[run]
        self.tokens -= run.tokens
        for key in run.blocks:
            del self._blocks[key]


def _last(blocks: Sequence[_Block]) -> int:
    return blocks[-1].number if blocks else 0


class Prefixes:
    """What an engine does with a prefix cache: rows take over what is known, and leave behind what they were fed."""

    def __init__(self, store: PrefixCache | None) -> None:
        self._store = store

    def reuse(self, rows: Sequence[LiveSequence], cache: Any) -> set[int]:
        """Fills rows that were not fed yet as far as their beginning is known.

        Returns the rows that had better wait a little, because an earlier row is being fed what they begin with too.
        It is served first anyway: the room for prompts in a step goes from the first row to the last.
        """
        waiting: set[int] = set()
        leaders: dict[Key, int] = {}
        if self._store is None:
            return waiting
        for row, sequence in enumerate(rows):
            held, known = cache.lengths[row], sequence.known
            if known - held < 2:
                continue
            if held == sequence.cached:
                match = self._store.match(sequence.tokens()[:-1])
                at = 0
                for kept, count in match.pieces:
                    if at + count > held:
                        cache.paste(row, at, kept, count)
                    at += count
                sequence.cached, sequence.frontier = max(held, match.tokens), match.frontier
            if sequence.frontier is None:
                continue
            leader = leaders.setdefault(sequence.frontier, row)
            if leader != row and cache.lengths[row] == sequence.cached:
                waiting.add(row)
        return waiting

    def keep_prompts(self, rows: Sequence[LiveSequence], cache: Any) -> None:
        """Keeps the prompts that have been fed; the first token of the answer has shown that nothing is wrong."""
        if self._store is not None:
            for row, sequence in enumerate(rows):
                if sequence.token_ids and not sequence.task.kept:
                    self.keep(row, sequence, cache)

    def keep(self, row: int, sequence: LiveSequence, cache: Any) -> None:
        """Keeps what a row was fed, prompt and answer."""
        if self._store is not None and sequence.branch == 0:
            sequence.task.kept = True
            tokens = sequence.tokens()[: cache.lengths[row] - sequence.ahead]  # what is seen to be finite
            try:
                self._store.keep(tokens, lambda start, end: cache.copy(row, start, end))
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self._store.clear()

    def clear(self) -> None:
        """Gives the memory back."""
        if self._store is not None:
            self._store.clear()
