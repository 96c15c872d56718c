"""Mirostat: the kept set of both versions, and the state that follows what is chosen."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from part_oracles import check_truncation, logit_rows, probabilities, table, tolerance, wide_rows

from llama_infer.chain import Chain
from llama_infer.processors.mirostat import Mirostat
from llama_infer.processors.temperature import Temperature
from llama_infer.samplers import Categorical


def definition(row, mirostat, mirostat_tau=5.0, mirostat_eta=0.1, mu=None):
    """The first step of a row: mu is twice tau."""
    mu = 2 * mirostat_tau if mu is None else mu
    nothing = np.zeros(len(row), bool)
    if mirostat == 0:
        return ~nothing, nothing
    if mirostat == 1:
        kept, near = zipf(row, mu)
    else:
        with np.errstate(divide="ignore"):
            surprise = -np.log2(probabilities(row))
        kept, near = surprise <= mu, np.abs(surprise - mu) < 2 * tolerance(row)
    best = row == row.max()
    return kept | best, near & ~best


def zipf(row, mu):
    """Version 1 as in the paper and llama.cpp, with the formula's limits."""
    ordered = np.sort(row)[::-1]
    best = ordered[np.isfinite(ordered)][:100]
    if len(best) < 2:
        return row == row.max(), np.zeros(len(row), bool)
    t = [math.log((i + 2) / (i + 1)) for i in range(len(best) - 1)]
    b = [best[i] - best[i + 1] for i in range(len(best) - 1)]
    s = sum(x * y for x, y in zip(t, b, strict=True)) / sum(x * x for x in t)
    size, excess = len(row), s - 1
    ratio = 1 / math.log(size) if abs(excess) < 1e-9 else excess / (1 - size**-excess)
    exact = math.log(ratio * 2**mu) / s if s > 0 else math.copysign(math.inf, math.log(ratio * 2**mu))
    k = math.exp(min(max(exact, -1), math.log(size) + 1))
    count = min(max(int(k), 1), size)
    unclear = abs(k - round(k)) < 1e-6 * k or abs(ratio * 2**mu - 1) < 1e-9
    return row >= ordered[count - 1], np.full(len(row), unclear)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_keeps_what_its_definition_keeps(data):
    logits = data.draw(logit_rows())
    rows = [
        {
            "mirostat": data.draw(st.integers(0, 2)),
            "mirostat_tau": data.draw(st.sampled_from([0.01, 0.7, 2.0, 5.0, 9.0])),
        }
        for _ in logits
    ]
    out = check_truncation(Mirostat(), logits, rows, definition)
    assert (out > -math.inf)[logits == logits.amax(-1, keepdim=True)].all()


@pytest.mark.parametrize("version", [1, 2])
def test_on_a_real_vocabulary(version):
    rows = [{"mirostat": version, "mirostat_tau": tau} for tau in (3.0, 4.0, 1.0)]
    out = check_truncation(Mirostat(), wide_rows(), rows, definition)
    assert (out > -math.inf).sum() < 128256


def test_version_1_where_zipfs_exponent_is_1():
    """The formula is 0 / 0 there; its limit gives k = 2**mu / ln V, here 1.46 and 2.19."""
    logits = torch.tensor([[0.0, -math.log(2)]] * 2, dtype=torch.float64)
    out = Mirostat()(logits, table(Mirostat(), [{"mirostat": 1, "mirostat_tau": tau} for tau in (0.01, 0.3)]))
    assert (out > -math.inf).sum(-1).tolist() == [1, 2]


def run(chain, logits, batch, steps):
    """Chooses ``steps`` times from the same logits; the tokens and the table."""
    chosen = []
    for _ in range(steps):
        choice = chain(logits, batch)
        chosen.append(choice.tokens)
        batch = replace(
            batch, length=batch.length + 1, columns={**batch.columns, **choice.columns}
        )  # the position moves the noise
    return torch.stack(chosen, 1), batch


def everything(part, rows, seeds=None):
    batch = table(part, rows, seeds)
    columns = {**batch.columns, "temperature": torch.ones(len(rows), dtype=torch.float64)}
    return replace(batch, columns=columns, values={**batch.values, "temperature": frozenset({1.0})})


@pytest.mark.parametrize("version", [1, 2])
def test_mu_follows_the_surprise_of_what_is_chosen(version):
    part, generator = Mirostat(), torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(3, 300, generator=generator)
    rows = [{"mirostat": version, "mirostat_tau": tau, "mirostat_eta": eta} for tau, eta in ((3.0, 0.1), (1.0, 0.5))]
    rows.append({"mirostat": 0, "mirostat_tau": 4.0})
    batch = everything(part, rows, seeds=[1, 2, 3])
    chain = Chain([Temperature(), part], Categorical())
    mu = [6.0, 2.0, 8.0]
    for _ in range(12):
        assert batch["mirostat_mu"].tolist() == pytest.approx(mu, abs=1e-5)
        choice = chain(logits, batch)
        for at, row in enumerate(rows[:2]):
            numbers = logits[at].double().numpy()
            kept, _ = definition(numbers, **row, mu=mu[at])
            token = int(choice.tokens[at])
            assert kept[token]
            p = probabilities(np.where(kept, numbers, -np.inf))[token]
            mu[at] -= row["mirostat_eta"] * (-math.log2(p) - row["mirostat_tau"])
        batch = replace(batch, length=batch.length + 1, columns={**batch.columns, **choice.columns})
    assert len({round(m, 3) for m in mu}) == 3


def test_the_mean_surprise_comes_near_the_target():
    """What mirostat is for: 3 bits a token, though the raw distribution has about 7."""
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0)).expand(4, -1)
    part = Mirostat()
    batch = everything(part, [{"mirostat": 2, "mirostat_tau": 3.0}] * 4, seeds=range(4))
    chain = Chain([part], Categorical())
    _, batch = run(chain, logits, batch, 100)
    surprises = []
    for _ in range(100):
        scores = chain.scores(logits, batch)
        choice = chain(logits, batch)
        surprises.append(-scores.log_softmax(-1).gather(1, choice.tokens[:, None]) / math.log(2))
        batch = replace(batch, length=batch.length + 1, columns={**batch.columns, **choice.columns})
    assert abs(float(torch.stack(surprises).mean()) - 3.0) < 0.4


def test_rows_take_their_state_along():
    """A row that moved, was forked or joined another table goes on as one that stayed alone."""
    part = Mirostat()
    logits = 2 * torch.randn(1, 200, generator=torch.Generator().manual_seed(5))
    rows = [{"mirostat": 2, "mirostat_tau": tau} for tau in (1.0, 2.0, 3.0)]
    chain = Chain([part], Categorical())
    _, batch = run(chain, logits.expand(3, -1), everything(part, rows, [1, 2, 3]), 5)
    alone = []
    for at in range(3):
        _, single = run(chain, logits, everything(part, rows[at : at + 1], [at + 1]), 5)
        assert torch.equal(single["mirostat_mu"], batch["mirostat_mu"][at : at + 1])
        alone.append(run(chain, logits, single, 5))
    assert len(set(batch["mirostat_mu"].tolist())) == 3
    moved = batch.select(torch.tensor([2, 0])).extend(batch.select(torch.tensor([1])))
    tokens, after = run(chain, logits.expand(3, -1), moved, 5)
    for place, at in enumerate((2, 0, 1)):
        assert torch.equal(tokens[place], alone[at][0][0])
        assert after["mirostat_mu"][place] == alone[at][1]["mirostat_mu"][0]


def test_a_row_without_tokens_keeps_its_mu():
    part = Mirostat()
    batch = table(part, [{"mirostat": 2}] * 2)
    logits = torch.stack([torch.full((9,), -math.inf), torch.zeros(9)])
    assert part.accept(logits, torch.tensor([0, 4]), batch)["mirostat_mu"].isfinite().all()
    assert part.accept(logits, torch.tensor([0, 4]), batch)["mirostat_mu"][0] == 10.0
    assert torch.equal(part(logits, batch)[0], logits[0])
