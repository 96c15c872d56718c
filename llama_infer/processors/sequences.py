"""Token sequences with a bias each, as a column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WILDCARD = -1
"""Fills prefixes up: any token matches it."""


@dataclass(frozen=True)
class Sequences:
    """A column: sequences of tokens with a bias each, K a row at most, of L + 1 tokens at most.

    Attributes:
        prefixes: int64 [R, K, L], all but the last token, the nearest first; filled up with a wildcard.
        last: int64 [R, K]; biases: float64 [R, K]. The filling adds 0 to token 0.
    """

    prefixes: Tensor
    last: Tensor
    biases: Tensor

    @staticmethod
    def of(rows: Sequence[Sequence[tuple[tuple[int, ...], float]]]) -> Sequences:
        """From lists of pairs."""
        import torch

        count = max(map(len, rows), default=0)
        longest = max((len(tokens) - 1 for row in rows for tokens, _ in row), default=0)
        prefixes, last, biases = [], [], []
        for row in rows:
            filling = count - len(row)
            padded = [[*tokens[-2::-1], *[WILDCARD] * (longest - len(tokens) + 1)] for tokens, _ in row]
            prefixes.append(padded + [[WILDCARD] * longest] * filling)
            last.append([tokens[-1] for tokens, _ in row] + [0] * filling)
            biases.append([float(bias) for _, bias in row] + [0.0] * filling)
        return Sequences(
            torch.tensor(prefixes, dtype=torch.int64).reshape(len(rows), count, longest),
            torch.tensor(last, dtype=torch.int64).reshape(len(rows), count),
            torch.tensor(biases, dtype=torch.float64).reshape(len(rows), count),
        )

    def select(self, index: Tensor) -> Sequences:
        """The rows ``index``."""
        return Sequences(self.prefixes[index], self.last[index], self.biases[index])

    def extend(self, other: Sequences) -> Sequences:
        """The other's rows behind these."""
        import torch

        count, longest = (max(self.prefixes.shape[axis], other.prefixes.shape[axis]) for axis in (1, 2))
        mine, theirs = self._widen(count, longest), other._widen(count, longest)
        return Sequences(
            torch.cat([mine.prefixes, theirs.prefixes]),
            torch.cat([mine.last, theirs.last]),
            torch.cat([mine.biases, theirs.biases]),
        )

    def to(self, device: torch.device | str) -> Sequences:
        """The column on a device."""
        return Sequences(self.prefixes.to(device), self.last.to(device), self.biases.to(device))

    def _widen(self, count: int, longest: int) -> Sequences:
        from torch.nn.functional import pad

        more = count - self.last.shape[1]
        prefixes = pad(self.prefixes, (0, longest - self.prefixes.shape[2], 0, more), value=WILDCARD)
        return replace(self, prefixes=prefixes, last=pad(self.last, (0, more)), biases=pad(self.biases, (0, more)))
