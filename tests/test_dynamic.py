"""Dynamic temperature and quadratic smoothing against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from part_oracles import check_transform, entropy, logit_rows, table, wide_rows

from llama_infer.processors.dynamic import DynamicTemperature, QuadraticSmoothing


def dynamic(row, dynatemp_low=0.0, dynatemp_high=0.0, dynatemp_exponent=1.0):
    finite = int(np.isfinite(row).sum())
    if finite < 2 or (dynatemp_low, dynatemp_high) == (0.0, 0.0):
        return row
    share = min(1.0, entropy(row) / math.log(finite)) ** dynatemp_exponent
    temperature = dynatemp_low + (dynatemp_high - dynatemp_low) * share
    with np.errstate(over="ignore"):
        return (row - row.max()) / max(temperature, 1e-30)


def smoothed(row, smoothing_factor, smoothing_curve=1.0):
    if smoothing_factor == 0:
        return row
    d = np.where(np.isfinite(row), row, 0.0) - row.max()
    k, s = (3 - smoothing_curve) / 2, (smoothing_curve - 1) / 2
    bent = -(k * smoothing_factor * d**2) + s * smoothing_factor * d**3 + row.max()
    return np.where(np.isfinite(row), bent, row)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_dynamic_temperature_follows_its_formula(data):
    logits = data.draw(logit_rows())
    values = st.sampled_from([0.0, 0.3, 1.0, 1.7, 5.0])
    rows = [
        {
            "dynatemp_low": data.draw(values),
            "dynatemp_high": data.draw(values),
            "dynatemp_exponent": data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        }
        for _ in logits
    ]
    # Where the temperature nears 0 a rounding error of the logits decides: only rows that stay warm are compared.
    warm = [at for at, row in enumerate(rows) if min(row["dynatemp_low"], row["dynatemp_high"]) > 0]
    if warm:
        check_transform(DynamicTemperature(), logits[warm], [rows[at] for at in warm], dynamic)
    out = DynamicTemperature()(logits, table(DynamicTemperature(), rows))
    assert not out.isnan().any()
    assert (out == out.amax(-1, keepdim=True))[logits == logits.amax(-1, keepdim=True)].all()


@pytest.mark.parametrize("part", [DynamicTemperature(), QuadraticSmoothing()])
def test_on_a_real_vocabulary(part):
    if part.name == "dynamic_temperature":
        rows = [{"dynatemp_low": 0.5, "dynatemp_high": 1.5}] * 3
        out = check_transform(part, wide_rows(), rows, dynamic)
    else:
        rows = [{"smoothing_factor": 0.3, "smoothing_curve": 1.5}] * 3
        out = check_transform(part, wide_rows(), rows, smoothed)
    assert not torch.equal(out, wide_rows())


def test_dynamic_temperature_is_low_when_certain_and_high_when_not():
    part = DynamicTemperature()
    flat, certain = torch.zeros(1, 8), torch.tensor([[0.0] + [-90.0] * 7])
    uneven = flat + torch.tensor([0.0, 1e-3] * 4)
    params = [{"dynatemp_low": 0.5, "dynatemp_high": 2.0}]
    out = part(uneven, table(part, params))
    assert float(out.amax() - out.amin()) == pytest.approx(1e-3 / 2.0, rel=1e-3)
    assert float(part(certain, table(part, params)).amin()) == pytest.approx(-180.0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 2.0), (2.0, 0.0)])
def test_one_end_of_the_temperature_may_be_0(low, high):
    part = DynamicTemperature()
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    out = part(logits, table(part, [{"dynatemp_low": low, "dynatemp_high": high}]))
    assert out[0].tolist() == pytest.approx(dynamic(logits[0].double().numpy(), low, high).tolist(), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_smoothing_follows_its_formula(data):
    logits = data.draw(logit_rows())
    rows = [
        {
            "smoothing_factor": data.draw(st.sampled_from([0.0, 1e-3, 0.2, 1.0, 8.0])),
            "smoothing_curve": data.draw(st.sampled_from([1.0, 1.5, 3.0, 10.0])),
        }
        for _ in logits
    ]
    check_transform(QuadraticSmoothing(), logits, rows, smoothed)


def test_smoothing_by_hand():
    logits = torch.tensor([[3.0, 2.0, 0.0, -math.inf]])
    out = QuadraticSmoothing()(logits, table(QuadraticSmoothing(), [{"smoothing_factor": 0.5}]))
    assert out.tolist() == [[0.0, -0.5, -4.5, -math.inf]]
    out = QuadraticSmoothing()(logits, table(QuadraticSmoothing(), [{"smoothing_factor": 0.5, "smoothing_curve": 2.0}]))
    assert out.tolist() == [[0.0, -0.5, -9.0, -math.inf]]


@pytest.mark.parametrize("curve", [1.0, 2.0, 3.0])
def test_smoothing_survives_huge_distances(curve):
    logits = torch.tensor([[5.0, -3e38, -1e20, -math.inf]])
    part = QuadraticSmoothing()
    out = part(logits, table(part, [{"smoothing_factor": 0.3, "smoothing_curve": curve}]))
    assert out[0, 0] == 0.0 and (out[0, 1:] < -1e30).all()
