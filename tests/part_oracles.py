"""For tests of single processors: tables for one part, logits of every shape, and what each truncation must promise.

A definition takes one row float64 [V] and its parameters and says which tokens stay and which are too close to call
("near"): there float rounding may decide either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from llama_infer import Batch
from llama_infer.candidates import Candidates
from llama_infer.chain import Chain
from llama_infer.columns import make_batch
from llama_infer.samplers import Greedy

Row = np.ndarray
Definition = Callable[..., tuple[np.ndarray, np.ndarray]]


def table(part: Any, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int] | None = None) -> Batch:
    """A batch for one part: the given parameters a row, the part's defaults for the others, fresh state."""
    complete = [
        {name: param.validate(name, row.get(name, param.default)) for name, param in part.params.items()}
        for row in rows
    ]
    return make_batch(Chain([part], Greedy()), part.params, complete, [[1]] * len(rows), seeds=seeds)


def neutral(part: Any) -> dict[str, Any]:
    """The part's parameters with every switch off."""
    return {name: p.default if p.neutral is None else p.neutral for name, p in part.params.items()}


@st.composite
def logit_rows(draw: Any, sizes: Sequence[int] = (2, 3, 7, 40, 150, 1200)) -> torch.Tensor:
    """float32 [R, V]: spread, peaked, flat, tied or far from 0, with -inf entries or a single finite one."""
    rows, size = draw(st.integers(1, 4)), draw(st.sampled_from(sizes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(rows, size, generator=generator)
    for row in logits:
        kind = draw(st.sampled_from(["spread", "peaked", "flat", "tied", "equal", "far"]))
        if kind == "tied":
            row.copy_((2 * row).round())
        elif kind == "equal":
            row.fill_(draw(st.sampled_from([0.0, -3.5])))
        elif kind == "far":
            row.add_(draw(st.sampled_from([-500.0, 500.0])))
        else:
            row.mul_({"spread": 3.0, "peaked": 12.0, "flat": 0.05}[kind])
        gone = draw(st.sampled_from([0.0, 0.0, 0.3, 0.9, 1.0]))
        mask = torch.rand(size, generator=generator) < gone
        mask[int(torch.randint(size, (1,), generator=generator))] = False
        row.masked_fill_(mask, -math.inf)
    return logits


def wide_rows() -> torch.Tensor:
    """float32 [3, 128256]: as peaked as a real model's, flat, and with most tokens at -inf."""
    generator = torch.Generator().manual_seed(7)
    logits = 1.5 * torch.randn(3, 128256, generator=generator)
    logits[0, 1000:1060] += torch.linspace(14, 6, 60)
    logits[1] *= 0.2
    logits[2, 300:] = -math.inf
    return logits


def probabilities(row: Row) -> Row:
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def entropy(row: Row) -> float:
    p = probabilities(row)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def at_least(row: Row, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of probability ``limit`` at least, and always the likeliest; near ones by the logits' rounding."""
    p = probabilities(row)
    with np.errstate(divide="ignore"):
        near = np.abs(np.log(p) - np.log(limit)) < tolerance(row) if limit > 0 else np.zeros(len(row), bool)
    return (p >= limit) | (row == row.max()), near & (row < row.max())


def tolerance(row: Row) -> float:
    """How far rounding to float32 may move a logit of this row, with room for sums."""
    return 2e-6 + 1e-6 * float(np.abs(row[np.isfinite(row)]).max())


def check_truncation(
    part: Any, logits: torch.Tensor, rows: Sequence[Mapping[str, Any]], definition: Definition | None
) -> torch.Tensor:
    """Everything that a truncation promises, for these logits and a set of parameters a row; gives its result."""
    given = logits.clone()
    batch = table(part, rows)
    out = part(logits, batch)
    assert torch.equal(logits, given), "wrote into its input"
    assert out.shape == logits.shape and out.dtype == logits.dtype and not out.isnan().any()
    kept = out > -math.inf
    assert kept.any(-1).all(), "a row is left empty"
    assert torch.equal(out[kept], logits[kept]), "changed a logit that stays"
    for at, params in enumerate(rows):
        alone = part(logits[at : at + 1], table(part, [params]))
        assert torch.equal(alone[0], out[at]), "a row depends on its company"
        if definition is not None:
            row = logits[at].double().numpy()
            expected, near = definition(row, **params)
            wrong = (kept[at].numpy() != (expected & np.isfinite(row))) & ~near
            assert not wrong.any(), (params, row[wrong], int(expected.sum()), int(kept[at].sum()))
    if hasattr(part, "narrow"):
        check_narrow(part, logits, batch, out)
    off = table(part, [neutral(part)] * len(rows))
    assert torch.equal(part(logits, off), logits), "neutral is not the identity"
    return out


def check_transform(
    part: Any,
    logits: torch.Tensor,
    rows: Sequence[Mapping[str, Any]],
    definition: Callable[..., Row],
    within: float = 1e-5,
) -> torch.Tensor:
    """What a part that reshapes a distribution promises: the definition's probabilities; gives its result."""
    given = logits.clone()
    out = part(logits, table(part, rows))
    assert torch.equal(logits, given), "wrote into its input"
    assert out.shape == logits.shape and out.dtype == logits.dtype and not out.isnan().any()
    assert (out[logits == -math.inf] == -math.inf).all(), "a removed token is back"
    for at, params in enumerate(rows):
        alone = part(logits[at : at + 1], table(part, [params]))
        assert torch.equal(alone[0], out[at]), "a row depends on its company"
        row = logits[at].double().numpy()
        expected = probabilities(definition(row, **params))
        error = np.abs(probabilities(out[at].double().numpy()) - expected).max()
        assert error < within, (params, error)
    off = table(part, [neutral(part)] * len(rows))
    assert torch.equal(part(logits, off), logits), "neutral is not the identity"
    return out


def check_narrow(part: Any, logits: torch.Tensor, batch: Batch, out: torch.Tensor) -> None:
    """On windows of any size: where the part says that it knows, exactly the plain call's tokens stay."""
    for count in (1, 5, 64, 300, logits.shape[1]):
        narrowed = part.narrow(Candidates.of(logits, count), batch)
        known = torch.from_numpy((narrowed.fits & narrowed.complete)[:, 0])
        ids, values = torch.from_numpy(narrowed.ids), torch.from_numpy(narrowed.values)
        full = torch.full_like(logits, -math.inf).scatter(1, ids, values)
        assert torch.equal(full[known], out[known]), f"a window of {count} gives something else"
        if count >= logits.shape[1]:
            assert known.all(), "all tokens are in the window and the part is still not sure"


def agrees_with(warper: Any, part: Any, logits: torch.Tensor, params: Mapping[str, Any], near: Any = None) -> None:
    """The same tokens stay as with transformers' warper, but for near ones (bool [R, V])."""
    theirs = warper(None, logits.clone()) > -math.inf
    ours = part(logits, table(part, [params] * len(logits))) > -math.inf
    wrong = theirs != ours
    assert not (wrong if near is None else wrong & ~near).any(), params
    assert ours.any() and not ours.all()
