"""The live batch as one table, what the model says of it, and what happens to it next."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from . import noise
from .transfer import upload

C = TypeVar("C", bound="StateColumn")


class StateColumn(Protocol):
    """A column that is not a plain tensor: it knows how to follow its rows."""

    def select(self: C, index: Tensor) -> C:
        """The column of the rows ``index`` int64 [S]: drop, reorder, fork."""

    def extend(self: C, other: C) -> C:
        """This column with the other's rows behind it."""


Column: TypeAlias = Tensor | StateColumn


@dataclass(frozen=True)
class Padded:
    """Ragged rows as a tensor [R, K], filled up at the right."""

    values: Tensor
    fill: float = -1

    @staticmethod
    def of(rows: Sequence[Sequence[float]], fill: float = -1, dtype: torch.dtype = torch.int64) -> Padded:
        """From one list a row, on the CPU."""
        values = torch.full((len(rows), max(map(len, rows), default=0)), fill, dtype=dtype)
        for row, items in zip(values, rows, strict=True):
            row[: len(items)] = torch.tensor(list(items), dtype=dtype)
        return Padded(values, fill)

    def select(self, index: Tensor) -> Padded:
        return replace(self, values=self.values[index])

    def extend(self, other: Padded) -> Padded:
        width = max(self.values.shape[1], other.values.shape[1])
        return replace(self, values=torch.cat([self.widen(width).values, other.widen(width).values]))

    def widen(self, width: int) -> Padded:
        """With at least ``width`` columns."""
        missing = width - self.values.shape[1]
        if missing <= 0:
            return self
        return replace(self, values=torch.nn.functional.pad(self.values, (0, missing), value=self.fill))

    def to(self, device: torch.device | str) -> Padded:
        return replace(self, values=upload(self.values, device))


def select(column: Column, index: Tensor) -> Column:
    """The column of the rows ``index``."""
    return column.index_select(0, index) if isinstance(column, Tensor) else column.select(index)


def extend(column: Column, other: Column) -> Column:
    """The column with the other's rows behind it."""
    return torch.cat([column, other]) if isinstance(column, Tensor) else column.extend(other)  # type: ignore[list-item,arg-type]


@dataclass(frozen=True)
class Output:
    """What one forward says.

    Attributes:
        logits: float32 (or float64) [M, V], a row for each table row whose known tokens have all been fed.
        rows: int64 [M], which rows of the table those are, ascending; None when they are all of them, in order.
        totals: [M], ``logits.logsumexp(-1)`` where it is known already.
    """

    logits: Tensor
    rows: Tensor | None = None
    totals: Tensor | None = None

    def index(self, count: int) -> Tensor:
        """int64 [count]: for each row of a table of ``count`` rows its row of logits, -1 where it has none."""
        everything = torch.arange(self.logits.shape[0], device=self.logits.device)
        if self.rows is None:
            return everything
        return torch.full((count,), -1, device=everything.device).scatter(0, self.rows, everything)


@dataclass(frozen=True)
class Plan:
    """What happens next, decided by a strategy, carried out by the engine.

    Attributes:
        tokens: int64 [S, K], the tokens decided for each row; below zero: none (the chain's codes say why).
        parents: int64 [S], the row that each continues; None: itself, then S = R.
        columns: new values of state columns, S rows each.
    """

    tokens: Tensor
    parents: Tensor | None = None
    columns: Mapping[str, Column] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """An immutable table, a row for each live sequence: every method returns a new one.

    Attributes:
        history: the tokens known so far, prompt and answer.
        length: int64 [R], how many they are.
        prompt_length: int64 [R].
        seed, branch: int64 [R], which noise a row draws; ``branch`` tells the samples of one request apart.
        request: int64 [R], equal for the rows of one request.
        columns: parameters and parts' state, by name.
        values: what the host knows of each parameter: a superset of the values that it takes in these rows.
        width: an upper bound of ``length`` known on the host.
    """

    history: Padded
    length: Tensor
    prompt_length: Tensor
    seed: Tensor
    branch: Tensor
    request: Tensor
    columns: Mapping[str, Column] = field(default_factory=dict)
    values: Mapping[str, frozenset[Hashable]] = field(default_factory=dict)
    width: int = 0

    @staticmethod
    def of(
        tokens: Sequence[Sequence[int]],
        *,
        prompt_lengths: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        requests: Sequence[int] | None = None,
        columns: Mapping[str, Column] | None = None,
        values: Mapping[str, frozenset[Hashable]] | None = None,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """A table of the given token lists; their whole length counts as prompt unless said otherwise."""
        count = len(tokens)
        lengths = [len(row) for row in tokens]

        def column(given: Sequence[int] | None, default: Sequence[int]) -> Tensor:
            return upload(torch.tensor(list(default if given is None else given), dtype=torch.int64), device)

        return Batch(
            history=Padded.of(tokens).to(device),
            length=column(None, lengths),
            prompt_length=column(prompt_lengths, lengths),
            seed=column(seeds, [0] * count),
            branch=column(None, [0] * count),
            request=column(requests, range(count)),
            columns=dict(columns or {}),
            values=dict(values or {}),
            width=max(lengths, default=0),
        )

    def __len__(self) -> int:
        return self.length.shape[0]

    def __getitem__(self, name: str) -> Tensor:
        """A column, aligned with the rows: a parameter's or a part's own."""
        column = self.columns[name]
        return column.values if isinstance(column, Padded) else column  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Where the columns are."""
        return self.length.device

    @property
    def tokens(self) -> Tensor:
        """int64 [R, width]: the tokens known, -1 behind the end of a row."""
        return self.history.values[:, : self.width]

    @property
    def position(self) -> Tensor:
        """int64 [R]: where the next token goes."""
        return self.length

    def generated(self) -> Tensor:
        """bool [R, width]: true at the tokens of the answer, false at the prompt's and behind the end."""
        at = torch.arange(self.width, device=self.device)[None]
        return (at >= self.prompt_length[:, None]) & (at < self.length[:, None])

    def uniform(self, stream: str, index: int | Tensor = 0) -> Tensor:
        """Noise in the open interval (0, 1), float32. Use a stream name of your own for each independent use.

        An int gives [R]; int64 [K] gives [R, K], the same indices in each row; int64 [R, K] gives [R, K]. The numbers
        depend on the row's seed, branch and position, the stream and the index, and on nothing else.
        """
        keys = noise.key(self.seed, self.branch, self.position, stream)
        if isinstance(index, int):
            return noise.uniform(keys, torch.full_like(keys, index)[:, None])[:, 0]
        return noise.uniform(keys, index if index.ndim == 2 else index[None])

    def all_equal(self, name: str, value: Hashable) -> bool:
        """Whether the host knows that a parameter has this value in every row."""
        return name in self.values and self.values[name] <= {value}

    def select(self, index: Tensor) -> Batch:
        """The rows ``index`` int64 [S]: drop, reorder, repeat."""
        return replace(
            self,
            history=self.history.select(index),
            length=self.length[index],
            prompt_length=self.prompt_length[index],
            seed=self.seed[index],
            branch=self.branch[index],
            request=self.request[index],
            columns={name: select(column, index) for name, column in self.columns.items()},
        )

    def extend(self, other: Batch) -> Batch:
        """This table with the other's rows behind it; both have the same columns."""
        return Batch(
            history=self.history.extend(other.history),
            length=torch.cat([self.length, other.length]),
            prompt_length=torch.cat([self.prompt_length, other.prompt_length]),
            seed=torch.cat([self.seed, other.seed]),
            branch=torch.cat([self.branch, other.branch]),
            request=torch.cat([self.request, other.request]),
            columns={name: extend(column, other.columns[name]) for name, column in self.columns.items()},
            values={name: known | other.values.get(name, frozenset()) for name, known in self.values.items()},
            width=max(self.width, other.width),
        )

    def fork(self, parents: Tensor) -> Batch:
        """``select``, after which the rows of a request that share a branch are renumbered, so that siblings differ."""
        rows = self.select(parents)
        same = rows.request[:, None] == rows.request[None]
        clash = (same & (rows.branch[:, None] == rows.branch[None])).sum(1) > 1
        renumber = (same & clash[None]).any(1)
        rank = same.tril(-1).sum(1)
        return replace(rows, branch=torch.where(renumber, rank, rows.branch))

    def at(self, output: Output) -> Batch:
        """The rows that the logits belong to, aligned with them."""
        return self if output.rows is None else self.select(output.rows)

    def advance(self, plan: Plan) -> Batch:
        """The table after the plan."""
        rows = self if plan.parents is None else self.fork(plan.parents)
        count = plan.tokens.shape[1]
        at = rows.length[:, None] + torch.arange(count, device=self.device)
        history = rows.history.widen(_capacity(self.width + count, rows.history.values.shape[1]))
        return replace(
            rows,
            history=replace(history, values=history.values.scatter(1, at, plan.tokens)),
            length=rows.length + (plan.tokens >= 0).sum(1),
            columns={**rows.columns, **plan.columns},
            width=self.width + count,
        )


def _capacity(needed: int, held: int) -> int:
    """Room grows geometrically."""
    return held if needed <= held else max(needed, held + held // 2, 64)
