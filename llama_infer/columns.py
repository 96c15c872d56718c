"""Parameters of requests as columns of the table: made once, when a request joins."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, Column
from .chain import Chain, hashable
from .parts import Param
from .transfer import upload
from .types import Value

_DTYPES = {float: torch.float32, int: torch.int64, bool: torch.bool}


def known_values(declared: Iterable[str], rows: Sequence[Mapping[str, Value]]) -> dict[str, frozenset[Hashable]]:
    """What each parameter is in these rows, for the host to know without asking the device."""
    return {name: frozenset(hashable(row[name]) for row in rows) for name in declared}


def make_batch(
    chain: Chain,
    declared: Mapping[str, Param],
    rows: Sequence[Mapping[str, Value]],
    tokens: Sequence[Sequence[int]],
    *,
    prompt_lengths: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    requests: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """A table of new rows: their tokens, their parameters (complete: a value for every declared one), fresh state."""
    columns: dict[str, Column] = {}
    for name, param in declared.items():
        column = _column(chain.parts, name, param, [row[name] for row in rows])
        if column is not None:
            columns[name] = _to_device(column, device)
    batch = Batch.of(
        tokens,
        prompt_lengths=prompt_lengths,
        seeds=seeds,
        requests=requests,
        columns=columns,
        values=known_values(declared, rows),
        device=device,
    )
    state = {name: _to_device(column, device) for name, column in chain.state(batch).items()}
    return replace(batch, columns={**columns, **state})


def _column(parts: Sequence[Any], name: str, param: Param, values: Sequence[Value]) -> Column | None:
    """The part's own column, a tensor of numbers, or None for what only the host reads."""
    for part in parts:
        if name in getattr(part, "params", {}) and hasattr(part, "prepare"):
            prepared: Column = part.prepare(name, values)
            return prepared
    dtype = _DTYPES.get(param.type)
    if dtype is None or param.default is None:  # what may be unset is for the host to read
        return None
    return _float32(values) if dtype == torch.float32 else torch.tensor(list(values), dtype=dtype)


def _float32(values: Sequence[float]) -> Tensor:
    """float32 [R], in which what is neither zero nor infinite stays so: 1e-50 is no greedy temperature."""
    limits = torch.finfo(torch.float32)
    if all(value == 0 or limits.tiny <= abs(value) <= limits.max for value in values):
        return torch.tensor(list(values), dtype=torch.float32)
    exact = torch.tensor(list(values), dtype=torch.float64)
    near = exact.clamp(limits.min, limits.max).where(exact.isfinite(), exact).float()
    return near.where((near != 0) | (exact == 0), exact.sign().float() * limits.tiny)


def _to_device(column: Column, device: torch.device | str) -> Column:
    if isinstance(column, Tensor):
        return upload(column, device)
    return column.to(device) if hasattr(column, "to") else column
