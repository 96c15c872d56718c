"""Passes over whole rows, by the kernel and without it, on any logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_infer import noise, rows, samplers
from llama_infer.native import library
from llama_infer.rows import argmax, contenders, likeliest, log_total, spreads, weights, widened

compiled = pytest.mark.skipif(library("rows") is None, reason="no C++ compiler, or no cache folder of one's own")
each_way = pytest.mark.parametrize("native", [pytest.param(True, marks=compiled), False])


@pytest.fixture(autouse=True)
def chosen_way(request, monkeypatch):
    """Without the kernels where the test says so."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and not callspec.params.get("native", True):
        monkeypatch.setattr(rows, "_kernels", dict)


SUMS = {
    "usual": lambda noise: 4 * noise,
    "large": lambda noise: 4 * noise + 300,
    "small": lambda noise: 4 * noise - 300,
    "spread": lambda noise: 90 * noise,
    "near the end": lambda noise: noise.clamp(max=0.5) + 87.5,
    "one": lambda noise: torch.full_like(noise, -math.inf).index_fill(0, torch.tensor([3]), -40.0),
    "hardly one": lambda noise: torch.full_like(noise, -math.inf).index_fill(0, torch.tensor([3]), -70.0),
    "hardly any": lambda noise: noise - 86,
}


@each_way
@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(sorted(SUMS)), min_size=1, max_size=4), st.sampled_from([5, 3000]), st.integers(0, 99))
def test_the_sum_is_that_in_float64(native, kinds, vocabulary, seed):
    noise = torch.randn(len(kinds), vocabulary, generator=torch.Generator().manual_seed(seed))
    logits = torch.stack([SUMS[kind](row) for kind, row in zip(kinds, noise, strict=True)])
    torch.testing.assert_close(log_total(logits).double(), logits.double().logsumexp(-1), rtol=1e-6, atol=2e-6)


@compiled
@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(sorted(SUMS)), min_size=1, max_size=4), st.sampled_from([5, 3000]), st.integers(0, 99))
def test_the_sum_beside_the_largest_is_that_in_float64(kinds, vocabulary, seed):
    noise = torch.randn(len(kinds), vocabulary, generator=torch.Generator().manual_seed(seed))
    logits = torch.stack([SUMS[kind](row) for kind, row in zip(kinds, noise, strict=True)])
    logits[0, ::2] = -math.inf
    largest, sums = weights(logits)
    assert torch.equal(largest, logits.amax(-1))
    x = logits.double() - largest[:, None]
    expected = torch.stack([x.exp().sum(-1), (x * x.exp()).nan_to_num(0.0).sum(-1)], -1)
    torch.testing.assert_close(sums, expected, rtol=4e-7, atol=1e-7)
    again, found = spreads(logits)
    finite = [row[row > -math.inf].double() for row in logits]
    expected = torch.stack([row.std(correction=0, dim=0, keepdim=True) for row in finite])
    assert torch.equal(again, largest)
    torch.testing.assert_close(found, expected, rtol=4e-7, atol=1e-6)


@compiled
@pytest.mark.parametrize("fault", [math.nan, -math.nan, math.inf])
def test_a_largest_that_is_not_finite_shows_beside_its_sum(fault):
    logits = torch.full((3, 99), -math.inf)
    logits[1, 70], logits[2, 98] = fault, -5.0
    largest, sums = weights(logits)
    torch.testing.assert_close(largest, torch.tensor([-math.inf, fault, -5.0]), rtol=0, atol=0, equal_nan=True)
    expected = torch.tensor([[0.0] * 2, [fault] * 2, [1.0, 0.0]]).double()
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-30, equal_nan=True)
    again, found = spreads(logits)
    torch.testing.assert_close(again, largest, rtol=0, atol=0, equal_nan=True)
    assert found[:2].isnan().all() and found[2] == 0


@each_way
@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(sorted(SUMS)), min_size=1, max_size=4), st.sampled_from([5, 3000]), st.integers(0, 99))
def test_half_logits_are_widened_as_they_are_summed(native, kinds, vocabulary, seed):
    noise = torch.randn(len(kinds), vocabulary, generator=torch.Generator().manual_seed(seed))
    logits = torch.stack([SUMS[kind](row) for kind, row in zip(kinds, noise, strict=True)]).bfloat16()
    logits[0, 1] = [math.nan, math.inf, -math.inf, 0.0][seed % 4]
    wide, totals = widened(logits)
    torch.testing.assert_close(wide, logits.float(), rtol=0, atol=0, equal_nan=True)
    assert (totals is not None) == native
    if totals is not None:
        expected = logits.double().logsumexp(-1)
        torch.testing.assert_close(totals.double(), expected, rtol=1e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_logits_stay(dtype):
    logits = torch.zeros(2, 5, dtype=dtype)
    assert widened(logits)[0] is logits


@each_way
@pytest.mark.parametrize(("fault", "total"), [(math.nan, math.nan), (math.inf, math.inf), (-math.inf, -math.inf)])
def test_faults_show(native, fault, total):
    logits = torch.zeros(2, 9)
    logits[1] = fault if fault == -math.inf else logits[1].index_fill(0, torch.tensor([4]), fault)
    found = log_total(logits).tolist()
    assert found[0] == pytest.approx(math.log(9)) and found[1:] == pytest.approx([total], nan_ok=True)


VALUES = {
    "random": lambda noise: noise,
    "tied": lambda noise: torch.full_like(noise, -2.0),
    "steps": lambda noise: noise.round(),
    "negative": lambda noise: -noise.abs() - 1,
    "zeros": lambda noise: noise.sign() * 0.0,
    "excluded": lambda noise: noise.where(noise > 0.5, -math.inf),
    "one": lambda noise: noise.where(noise == noise.amax(), -math.inf),
    "infinite": lambda noise: noise.where(noise < 2.5, math.inf),
    "NaN": lambda noise: noise.where(noise < 2.5, math.nan),
    "negative NaN": lambda noise: noise.where(noise < 2.5, -torch.tensor(math.nan, dtype=noise.dtype)),
}


@each_way
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=4),
    st.sampled_from([1, 2, 64, 100, 4096, 5000, 12_800]),
    st.sampled_from([1, 2, 7, 64, 80]),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_likeliest_are_those_of_a_sort(native, kinds, vocabulary, count, double, seed):
    """NaN first; each token once, with its own logit; whichever of equals at the end."""
    noise = torch.randn(len(kinds), vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = noise if double else noise.float()
    logits = torch.stack([VALUES[kind](row) for kind, row in zip(kinds, noise, strict=True)])
    values, ids = likeliest(logits, count)
    expected = logits.sort(-1, descending=True).values[:, :count]
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(logits.gather(1, ids), values, rtol=0, atol=0, equal_nan=True)
    assert all(len(set(row)) == min(count, vocabulary) for row in ids.tolist())
    largest = argmax(logits)
    assert torch.equal(largest, logits.argmax(-1))


@compiled
@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=4),
    st.sampled_from([1, 2, 63, 64, 4096, 5000]),
    st.sampled_from([0.0, 1e-3, 0.3, 1.0, 5.0, 300.0]),
    st.integers(0, 10**6),
)
def test_contenders_hold_the_largest_with_noise(kinds, vocabulary, scale, seed):
    """The noise of all tokens, added as it is defined; rows that are not finite are left to others."""
    gaussian = torch.randn(len(kinds), vocabulary, generator=torch.Generator().manual_seed(seed))
    logits = scale * torch.stack([VALUES[kind](row) for kind, row in zip(kinds, gaussian, strict=True)])
    logits = logits.where(~logits.isnan() | (scale > 0), 0.0)
    streams = np.arange(seed, seed + len(kinds), dtype=np.uint64) * np.uint64(0x123456789ABCDEF1)
    drawn = noise.gumbel_of(noise.bits(streams[:, None], np.arange(vocabulary, dtype=np.uint64)))
    best = (logits.numpy() + drawn).argmax(-1)
    found = contenders(logits, streams)
    for row, ids in enumerate(found):
        if not math.isfinite(logits[row].amax()):
            assert (ids == -1).all()
        elif ids[0] >= 0:
            assert best[row] in ids and (np.diff(ids) >= 0).all()
        assert samplers._draw(logits[row], streams[row : row + 1]) == best[row] or not logits[row].amax().isfinite()
    usual = [row for row, kind in enumerate(kinds) if kind == "random"]
    assert (found[usual] >= 0).all()


@compiled
def test_more_contenders_than_there_is_room_for_are_left_to_others():
    """Where nearly all of a row's logits lie beyond what a float adds noise to, they tie."""
    logits = torch.full((1, 200), 1e9)
    assert (contenders(logits, np.array([1], dtype=np.uint64)) == -1).all()


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_nan_of_either_sign_comes_first(native, dtype):
    logits = torch.randn(2, 12_800, generator=torch.Generator().manual_seed(3), dtype=dtype)
    logits[0, 77], logits[1, 12_345] = math.nan, -math.nan
    assert likeliest(logits, 3)[1][:, 0].tolist() == [77, 12_345]
    assert argmax(logits).tolist() == [77, 12_345]


@compiled
def test_rows_are_shared_among_threads():
    logits = torch.randn(9, 12_800, generator=torch.Generator().manual_seed(1))
    values, ids = likeliest(logits, 70)
    totals = log_total(logits)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = likeliest(logits, 70)
        assert torch.equal(again[0], values) and torch.equal(again[1], ids) and torch.equal(log_total(logits), totals)
    finally:
        torch.set_num_threads(threads)


@each_way
def test_rows_that_do_not_lie_one_behind_the_other(native):
    logits = torch.randn(12_800, 3, generator=torch.Generator().manual_seed(1)).T
    assert torch.equal(likeliest(logits, 5)[1], logits.contiguous().topk(5).indices)
    torch.testing.assert_close(log_total(logits), logits.logsumexp(-1))
