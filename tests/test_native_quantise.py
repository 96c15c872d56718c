"""The C++ quantiser finds what the plain one does, which finds nearly the best that the format has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_infer.models.int4 import Int4, quantise_plainly
from llama_infer.models.native.integer import SPAN
from llama_infer.models.native.quantise import quantise
from llama_infer.native import library

compiled = pytest.mark.skipif(library("models/native/quantise", exact=True) is None, reason="no C++ compiler")
GROUPS = (32, 64, 128)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(form, weight):
    found = form.dequantise(form.quantise(weight))
    return ((found - weight).double().norm() / weight.double().norm()).item()


@compiled
@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 20),
    st.integers(1, 9),
    st.sampled_from(GROUPS),
    st.sampled_from([0, 1e-3, 3, -50]),
    st.sampled_from([1, 1e-36, 1e30]),
    st.sampled_from([1, 3, 9]),
    st.integers(0, 99),
)
def test_the_kernel_is_the_plain_version_to_the_last_bit(rows, groups, group_size, shift, size, power, seed):
    """Any shape; weights that are narrow, far from 0, tiny, huge, heavy-tailed."""
    weight = (random(rows, groups * group_size, seed=seed) ** power + shift) * size
    found, plain = quantise(weight, group_size), quantise_plainly(weight, group_size)
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        assert tensor.dtype == plain[name].dtype and torch.equal(tensor, plain[name]), name


@compiled
@pytest.mark.parametrize("group_size", GROUPS)
def test_equal_weights_and_ties(group_size):
    for weight in (torch.zeros(3, 128), torch.full((3, 256), -2.5), random(40, 256).round(), random(9, 256).sign()):
        found, plain = quantise(weight, group_size), quantise_plainly(weight, group_size)
        assert all(torch.equal(tensor, plain[name]) for name, tensor in found.items())


@pytest.mark.parametrize("function", [pytest.param(quantise, marks=compiled), quantise_plainly])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen(function, bad):
    weight = random(5, 640)
    clean = function(weight, 64)
    weight[3, 300] = bad
    scale = function(weight, 64)["scale"]
    assert scale.isnan().nonzero().tolist() == [[3, 1]]
    assert torch.equal(scale[:3], clean["scale"][:3]) and torch.equal(scale[:, 2], clean["scale"][:, 2])


@pytest.mark.parametrize("function", [pytest.param(quantise, marks=compiled), quantise_plainly])
def test_a_span_that_float32_does_not_hold_is_seen(function):
    weight = random(5, 640)
    weight[3, 300:302] = torch.tensor([3e38, -3e38])
    assert function(weight, 64)["scale"].isnan().nonzero().tolist() == [[3, 1]]


@compiled
def test_what_does_not_fit_is_refused():
    for weight in (torch.zeros(2, 96), torch.zeros(2, 128, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="groups of 64"):
            quantise(weight, 64)


def test_weights_far_from_zero_and_alone():
    """The offset reaches 34 units and a number 7 multipliers more: what lies beyond needs a larger multiplier."""
    far = random(64, 256) * 0.01 + 3
    assert error(Int4(), far) < 0.01 and error(Int4(), -far) < 0.01
    assert error(Int4(), torch.full((64, 256), 2.5)) < 0.02 and error(Int4(), torch.zeros(64, 128) + 1e-20) < 0.02


def least_error(weight, group_size):
    """By brute force: every multiplier and offset under 25 scales, for a widest multiplier of 10 to 16."""
    groups = weight.view(len(weight), -1, SPAN // group_size, group_size)
    widest = (groups.amax(-1) - groups.amin(-1)).amax(-1)
    best = torch.full_like(widest, torch.inf)
    for most in torch.arange(10, 16.01, 0.25):
        scale = (widest / (15 * most)).bfloat16().float()
        scaled = groups / scale[..., None, None]
        errors = torch.full(groups.shape[:-1], torch.inf)
        for m in range(1, 17):
            for o in range(-26, 35, 4):
                numbers = ((scaled - o) / m).round().clamp(max(-8, -((128 + o) // m)), min(7, (127 - o) // m))
                errors = torch.minimum(errors, (numbers * m + o - scaled).square().sum(-1))
        best = torch.minimum(best, errors.sum(-1) * scale * scale)
    return (best.double().sum() / weight.double().square().sum()).sqrt().item()


@pytest.mark.parametrize("group_size", [32, 128])
def test_the_search_is_near_the_best(group_size):
    weight = random(16, 256)
    best = least_error(weight, group_size)
    assert best < error(Int4(group_size), weight) < 1.1 * best
