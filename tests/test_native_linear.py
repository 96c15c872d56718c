"""Linear layers in C++ against float64, and what happens where there is no such kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from llama_infer.models.native.linear import Packing, kernel
from llama_infer.models.packed import PackedLinear, packing, refusal
from llama_infer.native import library

NATIVE = "models/native/linear"
compiled = pytest.mark.skipif(library(NATIVE) is None, reason="no C++ compiler, or no cache folder of one's own")
needs_packing = pytest.mark.skipif(refusal(torch.device("cpu"), torch.bfloat16) is not None, reason="no packed layout")


def layer(out, inputs, bias=False, seed=0):
    """A weight, a bias or None."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=draw).bfloat16()
    return weight, torch.randn(out, generator=draw).bfloat16() if bias else None


def laid_out(weight, outputs, multiple):
    """A weight as oneDNN packs it for one processor or another, and how it lies."""
    out, inputs = (-(-size // step) * step for size, step in zip(weight.shape, (outputs, multiple), strict=True))
    padded = torch.zeros(out, inputs, dtype=torch.bfloat16)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    return padded.view(-1, outputs, inputs // 2, 2).transpose(1, 2).contiguous(), Packing(outputs, inputs)


def inputs_of(rows, size, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(rows + seed)).bfloat16()


def close(found, exact):
    """Within one rounding to bfloat16, and what sums in float32 lose."""
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2**-10 * exact.abs().max().item())


@compiled
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 32),
    st.integers(1, 150),
    st.integers(1, 200),
    st.sampled_from([16, 32, 48, 64]),
    st.sampled_from([2, 16, 32, 64]),
    st.booleans(),
)
def test_every_shape_and_layout_is_the_definition(rows, out, inputs, outputs, multiple, bias):
    weight, added = layer(out, inputs, bias, rows)
    laid, lies = laid_out(weight, outputs, multiple)
    x = inputs_of(rows, inputs)
    found = kernel(laid.data_ptr(), (out, inputs), lies, added)(x)
    close(found, linear(x.double(), weight.double(), None if added is None else added.double()))


@compiled
@pytest.mark.parametrize("outputs", [32, 64])
def test_a_row_is_the_same_in_any_company(outputs):
    weight, _ = layer(1100, 16 * 7)
    laid, lies = laid_out(weight, outputs, 16)
    run = kernel(laid.data_ptr(), tuple(weight.shape), lies, None)
    x = inputs_of(32, weight.shape[1])
    together = run(x)
    for rows in range(1, 32):
        assert torch.equal(run(x[:rows]), together[:rows])
        assert torch.equal(run(x[-rows:]), together[-rows:])


@compiled
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_in_its_row(bad):
    weight, _ = layer(70, 16 * 5)
    laid, lies = laid_out(weight, 32, 16)
    x = inputs_of(19, weight.shape[1])
    run = kernel(laid.data_ptr(), tuple(weight.shape), lies, None)
    clean = run(x)
    x[17, 79] = bad
    found = run(x)
    others = torch.arange(19) != 17
    assert torch.equal(found[others], clean[others])
    assert torch.equal(found[17], (x[17].double() @ weight.double().T).bfloat16()) or torch.isnan(found[17]).all()


@compiled
@needs_packing
@pytest.mark.parametrize("shape", [(64, 64), (129, 66), (100, 71), (640, 256), (64, 4096)])
@pytest.mark.parametrize("bias", [False, True])
def test_what_onednn_packs_is_read(shape, bias):
    """The layout that it describes is the one that it has; both kernels' results are one rounding from exact."""
    weight, added = layer(*shape, bias)
    packed = PackedLinear(weight, added)
    lies = packing(packed._packed)
    if lies is None:
        pytest.skip("oneDNN packs in another way here")
    kernel = packed.kernel
    assert kernel is not None
    for rows in (1, 5, 32, 33):
        x = inputs_of(rows, shape[1])
        exact = linear(x.double(), weight.double(), None if added is None else added.double())
        close(packed(x), exact)
        assert (kernel(x) is not None) == (rows <= 32)
        packed.kernel = None
        close(packed(x), exact)
        packed.kernel = kernel


@compiled
@needs_packing
def test_inputs_of_every_kind():
    weight, _ = layer(96, 64)
    packed = PackedLinear(weight)
    x = inputs_of(6, 128)
    expected = packed(x[:, ::2].contiguous())
    assert torch.equal(packed(x[:, ::2]), expected) and packed(x[:0, ::2]).shape == (0, 96)
    assert torch.equal(packed(x[:, ::2].unflatten(0, (2, 3))), expected.unflatten(0, (2, 3)))
    assert torch.equal(packed(x[0, ::2]), expected[0])
    for wrong in (x, x[:, :32], x[:, ::2].float(), x[:, ::2].to("meta")):
        with pytest.raises((RuntimeError, NotImplementedError)):
            packed(wrong)


@compiled
@needs_packing
def test_threads_are_torchs_and_onednn_is_not_disturbed():
    weight, _ = layer(512, 256)
    packed = PackedLinear(weight)
    few, many = inputs_of(20, 256), inputs_of(64, 256)
    expected, before = (packed(few), packed(many)), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(3):
                assert torch.equal(packed(few), expected[0]) and torch.equal(packed(many), expected[1])
    finally:
        torch.set_num_threads(before)


@needs_packing
def test_without_a_kernel_onednn_does_it(monkeypatch):
    weight, bias = layer(128, 64, True)
    x = inputs_of(3, 64)
    ours = PackedLinear(weight, bias)(x)
    monkeypatch.setattr("llama_infer.models.native.linear._kernels", lambda: None)
    theirs = PackedLinear(weight, bias)
    assert theirs.kernel is None
    close(theirs(x), linear(x.double(), weight.double(), bias.double()))
    close(ours, linear(x.double(), weight.double(), bias.double()))


@needs_packing
def test_a_layout_that_is_not_known_is_not_read(monkeypatch):
    weight, _ = layer(128, 64)
    assert kernel(0, (128, 64), Packing(24, 64), None) is None
    packed = PackedLinear(weight)._packed
    described = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)

    class Ops:
        _nbytes = staticmethod(torch.ops.mkldnn._nbytes)
        changed = described

        def _get_mkldnn_serialized_md(self, packed):
            return self.changed

    fake = Ops()
    monkeypatch.setattr(torch.ops, "mkldnn", fake)
    known = packing(packed)
    for at in (4, 8, 16, 104, 112, 120, 312, 320, 328, 416, 424, 432, 440, 520, 528, 536):
        fake.changed = described.clone()
        fake.changed[at] += 1
        assert known is None or packing(packed) is None, at
    fake.changed = described[:400]
    assert packing(packed) is None
