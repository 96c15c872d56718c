"""Linear layers by the processor's tiles, on weights as they lie, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from llama_infer.models.native import tiled
from llama_infer.models.packed import TiledLinear

pytestmark = pytest.mark.skipif(not tiled.available(), reason="the processor has no tiles, or there is no compiler")


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(found, exact):
    """Within one rounding to bfloat16, and what sums in float32 lose."""
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2**-10 * exact.abs().max().item())


@settings(deadline=None, max_examples=60)
@given(
    st.one_of(st.integers(1, 33), st.integers(34, 700)), st.integers(32, 200), st.integers(32, 200), st.booleans(),
    st.integers(0, 3),
)  # fmt: skip
def test_every_shape_is_the_definition(rows, out, inputs, bias, offset):
    held = torch.full((offset + out * inputs + 64,), torch.nan, dtype=torch.bfloat16)  # in a file nothing is aligned
    weight = held[offset : offset + out * inputs].view(out, inputs).copy_(numbers(out, inputs))
    added = numbers(out, seed=1) if bias else None
    x = numbers(rows, inputs, seed=rows)
    exact = linear(x.double(), weight.double(), None if added is None else added.double())
    close(tiled.linear(x, weight, added), exact)


@pytest.mark.parametrize("rows", [1, 40, 256, 257, 512, 513])
@pytest.mark.parametrize("more", [0, 8])
def test_sums_that_wait_between_chunks_of_inputs_lose_nothing(rows, more):
    """More inputs than are laid out at once, of as many rows as there can be: ones, which bfloat16 sums exactly."""
    weight = torch.ones(40, 1024 * 17 + more)
    weight[:, ::2] = -1
    weight[torch.arange(40), 300 * torch.arange(40) + 1] += torch.arange(40.0)
    found = tiled.linear(torch.ones(rows, weight.shape[1], dtype=torch.bfloat16), weight.bfloat16())
    assert torch.equal(found, torch.arange(40).bfloat16().expand(rows, 40))


def test_more_outputs_than_wait_at_a_time():
    weight, which = torch.zeros(8192 + 72, 2080), torch.arange(8192 + 72)
    weight[which, which % 2079] = which % 64 + 0.0
    weight[:, 2079] = 64  # of the last inputs, which come when the sums have waited
    expected = (which % 64 + 64).bfloat16().expand(256, -1)
    assert torch.equal(tiled.linear(torch.ones(256, 2080).bfloat16(), weight.bfloat16()), expected)


@pytest.mark.parametrize(("out", "inputs"), [(1100, 112), (96, 8224)])
def test_a_row_is_the_same_in_any_company(out, inputs):
    weight, x = numbers(out, inputs), numbers(600, inputs, seed=1)
    together = tiled.linear(x, weight)
    for rows in (*range(1, 34), 49, 65, 100, 129, 200, 256, 257, 511, 599):
        assert torch.equal(tiled.linear(x[:rows], weight), together[:rows])
        assert torch.equal(tiled.linear(x[-rows:], weight), together[-rows:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [5, 19])
def test_what_is_not_finite_stays_so_and_in_its_row(bad, rows):
    weight, x = numbers(70, 80), numbers(rows, 80, seed=1)
    clean = tiled.linear(x, weight)
    x[3, 79] = bad
    found = tiled.linear(x, weight)
    others = torch.arange(rows) != 3
    assert torch.equal(found[others], clean[others])
    assert torch.equal(found[3], (x[3].double() @ weight.double().T).bfloat16()) or torch.isnan(found[3]).all()


def test_a_layer_is_the_linear_layer_it_was_made_of():
    """Whatever it is given: what the kernel does not take goes the way it always went."""
    plain = torch.nn.Linear(64, 96, dtype=torch.bfloat16).requires_grad_(False)
    layer = TiledLinear(plain)
    assert layer.weight is plain.weight and layer.bias is plain.bias and repr(layer) == f"Tiled{plain}"
    x = numbers(6, 128)[:, ::2]  # no row is dense
    close(layer(x), linear(x.double(), plain.weight.double(), plain.bias.double()))
    assert torch.equal(layer(x.unflatten(0, (2, 3))), layer(x).unflatten(0, (2, 3)))
    assert torch.equal(layer(x[0]), layer(x)[0]) and layer(x[:0]).shape == (0, 96)
    for wrong in (numbers(6, 128), x[:, :32], x.float(), x.to("meta")):
        with pytest.raises((RuntimeError, NotImplementedError)):
            layer(wrong)
    layer.float()
    assert layer(x.float()).dtype == torch.float32


def test_threads_are_torchs_and_onednn_is_not_disturbed():
    weight, few, many = numbers(512, 256), numbers(20, 256, seed=1), numbers(64, 256, seed=2)
    theirs, before = many @ many.T, torch.get_num_threads()
    expected = tiled.linear(few, weight), tiled.linear(many, weight)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(3):
                assert torch.equal(tiled.linear(few, weight), expected[0])
                assert torch.equal(tiled.linear(many, weight), expected[1])
                torch.testing.assert_close(many @ many.T, theirs)
    finally:
        torch.set_num_threads(before)
