"""Adaptive-p and the entropy-dependent temperature."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from part_oracles import check_transform, entropy, logit_rows, probabilities, table, wide_rows

from llama_infer.chain import Chain
from llama_infer.errors import ParameterError, PartError
from llama_infer.parts import Context
from llama_infer.processors.adaptive import AdaptiveP, EntropyTemperature
from llama_infer.processors.truncation import MinP
from llama_infer.samplers import Categorical


def aimed(row, adaptive_target, adaptive_decay=0.9, average=None):
    """The first step: the average is the target."""
    if adaptive_target < 0:
        return row
    average = adaptive_target if average is None else average
    aim = min(1.0, max(0.0, 2 * adaptive_target - average))
    d = np.abs(probabilities(row) - aim) / 0.3
    return np.where(np.isfinite(row), 5 - 10 * d * d / (1 + d), row)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_adaptive_p_follows_its_formula(data):
    logits = data.draw(logit_rows())
    rows = [
        {
            "adaptive_target": data.draw(st.sampled_from([-1.0, 0.0, 0.1, 0.55, 1.0])),
            "adaptive_decay": data.draw(st.sampled_from([0.0, 0.9, 0.99])),
        }
        for _ in logits
    ]
    check_transform(AdaptiveP(), logits, rows, aimed)


def test_adaptive_p_on_a_real_vocabulary():
    out = check_transform(AdaptiveP(), wide_rows(), [{"adaptive_target": 0.3}] * 3, aimed)
    assert out[0].isfinite().all()


def test_the_average_follows_the_tokens_own_probabilities():
    """Also of those below the target, which the transformed logits alone would not tell from those above."""
    part = AdaptiveP().bind(Context(None, 40))
    logits = 3 * torch.randn(2, 40, generator=torch.Generator().manual_seed(11))
    rows = [{"adaptive_target": 0.15, "adaptive_decay": 0.8}, {"adaptive_target": 0.5, "adaptive_decay": 0.0}]
    batch = table(part, rows, seeds=[1, 2])
    chain = Chain([part], Categorical())
    columns = {**batch.columns, "temperature": torch.ones(2, dtype=torch.float64)}
    batch = replace(batch, columns=columns, values={**batch.values, "temperature": frozenset({1.0})})
    total = [0.15 / (1 - 0.8), 0.5]
    weight = [1 / (1 - 0.8), 1.0]
    seen = set()
    for _ in range(25):
        for at, row in enumerate(rows):
            expected = aimed(logits[at].double().numpy(), **row, average=total[at] / weight[at])
            got = part(logits, batch)[at].double().numpy()
            assert np.abs(probabilities(got) - probabilities(expected)).max() < 1e-5
        choice = chain(logits, batch)
        for at, row in enumerate(rows):
            p = probabilities(logits[at].double().numpy())[int(choice.tokens[at])]
            seen.add(p > row["adaptive_target"])
            total[at] = p + row["adaptive_decay"] * total[at]
            weight[at] = 1 + row["adaptive_decay"] * weight[at]
        batch = replace(batch, length=batch.length + 1, columns={**batch.columns, **choice.columns})
        assert batch["adaptive_sum"].tolist() == pytest.approx(total, abs=1e-5)
        assert batch["adaptive_weight"].tolist() == pytest.approx(weight, abs=1e-5)
    assert seen == {True, False}


@pytest.mark.parametrize(("target", "average"), [(0.9, 0.2), (0.1, 0.9)])
def test_the_aim_stays_within_0_and_1(target, average):
    """However far what was chosen lies off the target."""
    part = AdaptiveP()
    logits = torch.tensor([[4.0, 1.0, 0.0, -2.0]])
    batch = table(part, [{"adaptive_target": target}])
    columns = {**batch.columns, "adaptive_sum": average * batch["adaptive_weight"]}
    got = part(logits, replace(batch, columns=columns))[0].tolist()
    assert got == pytest.approx(aimed(logits[0].double().numpy(), target, average=average).tolist(), abs=1e-4)


def test_rows_take_their_average_along():
    part = AdaptiveP()
    rows = [{"adaptive_target": target} for target in (0.1, 0.5, -1.0)]
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(2))
    batch = table(part, rows)
    part(logits, batch)
    batch = replace(batch, columns={**batch.columns, **part.accept(logits, torch.tensor([3, 4, 5]), batch)})
    assert batch["adaptive_sum"][2] == table(part, rows)["adaptive_sum"][2], "a row that is off learns nothing"
    moved = batch.select(torch.tensor([1, 0])).extend(batch.select(torch.tensor([2])))
    assert torch.equal(part(logits[[1, 0, 2]], moved), part(logits, batch)[[1, 0, 2]])
    fresh = part(logits, table(part, rows))
    assert not torch.equal(fresh[:2], part(logits, batch)[:2])


def test_it_works_behind_a_truncation_in_a_chain():
    part, generator = AdaptiveP(), torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(4, 500, generator=generator)
    batch = table(part, [{"adaptive_target": 0.2}] * 4, seeds=range(4))
    columns = {"min_p": torch.full((4,), 0.1), "temperature": torch.ones(4)}
    known = {"min_p": frozenset({0.1}), "temperature": frozenset({1.0})}
    batch = replace(batch, columns={**batch.columns, **columns}, values={**batch.values, **known})
    choice = Chain([MinP(), part], Categorical())(logits, batch)
    truncated = MinP()(logits, batch)
    own = truncated.softmax(-1).double().gather(1, choice.tokens[:, None])[:, 0]
    assert torch.allclose(choice.columns["adaptive_sum"].double(), own + 0.9 * batch["adaptive_sum"], atol=1e-6)


def test_accept_asks_for_the_call_of_the_same_batch():
    part = AdaptiveP()
    logits, batch = torch.zeros(1, 4), table(part, [{"adaptive_target": 0.2}])
    with pytest.raises(PartError, match="accept"):
        part.accept(logits, torch.tensor([0]), batch)
    part(logits, batch)
    with pytest.raises(PartError, match="accept"):
        part.accept(logits, torch.tensor([0]), table(part, [{"adaptive_target": 0.2}]))


def cooled(row, edt_theta, edt_base=0.8):
    nats = entropy(row)
    if edt_theta == 0:
        return row
    temperature = edt_base ** (edt_theta / nats) if nats > 0 else 0.0
    with np.errstate(over="ignore"):
        return (row - row.max()) / max(temperature, 1e-30)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_entropy_temperature_follows_its_formula(data):
    logits = data.draw(logit_rows())
    rows = [
        {
            "edt_theta": data.draw(st.sampled_from([0.0, 0.01, 0.1, 0.7])),
            "edt_base": data.draw(st.sampled_from([0.5, 0.8])),
        }
        for _ in logits
    ]
    # T falls to 0 with the entropy: the nearer, the more a rounding error of the logits is worth.
    nats = [entropy(row.double().numpy()) for row in logits]
    certain = [at for at, row in enumerate(rows) if nats[at] > 0.2]
    if certain:
        check_transform(EntropyTemperature(), logits[certain], [rows[at] for at in certain], cooled)
    out = EntropyTemperature()(logits, table(EntropyTemperature(), rows))
    assert not out.isnan().any()
    assert (out == out.amax(-1, keepdim=True))[logits == logits.amax(-1, keepdim=True)].all()


def test_entropy_temperature_on_a_real_vocabulary():
    out = check_transform(EntropyTemperature(), wide_rows(), [{"edt_theta": 0.7}] * 3, cooled)
    assert not torch.equal(out, wide_rows())


def test_entropy_temperature_by_hand():
    """Two equal tokens have ln 2 nats; with theta = ln 2 and N = 0.5 the temperature is 0.5."""
    logits = torch.tensor([[1.0, 1.0, -60.0]])
    part = EntropyTemperature()
    out = part(logits, table(part, [{"edt_theta": math.log(2), "edt_base": 0.5}]))
    assert out[0].tolist() == pytest.approx([0.0, 0.0, -122.0])


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (AdaptiveP(), "adaptive_target", 1.1),
        (AdaptiveP(), "adaptive_decay", 1.0),
        (EntropyTemperature(), "edt_theta", -0.1),
        (EntropyTemperature(), "edt_base", 1.0),
    ],
)
def test_refuses_what_is_out_of_range(part, name, value):
    with pytest.raises(ParameterError, match=name):
        part.params[name].validate(name, value)
