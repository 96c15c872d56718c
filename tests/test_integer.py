"""The kernels for 8- and 4-bit weights against integers that are written out, and what serves without them."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch
import torch.nn.functional as F
from checkpoints import edit_json, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_infer.errors import LoadingError
from llama_infer.models.int4 import Int4, Int4Linear, Int4TorchLinear
from llama_infer.models.int8 import Int8, Int8Linear, Int8TorchLinear, _exact_products
from llama_infer.models.loaders import AutoLoader
from llama_infer.models.native.integer import SPAN, kernel
from llama_infer.models.saved import save_quantised
from llama_infer.models.size import weight_bytes
from llama_infer.native import library
from llama_infer.parts import Source

IDS = torch.tensor([[256, *b"Why must we reduce pollution?"]])
pytestmark = pytest.mark.skipif(not _exact_products(), reason="needs VNNI")
compiled = pytest.mark.skipif(kernel("int8", torch.bfloat16) is None, reason="no kernel: no compiler, or no AVX-512")
FORMS = [Int8(), Int4(32), Int4(64), Int4(128)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(form, weight, bias=None, dtype=torch.bfloat16):
    return form.layer(form.quantise(weight), bias, dtype)


def definition(form, tensors, x):
    """Integers of each span, multiplied exactly, then scaled, in float64."""
    width = x.shape[1]
    x = F.pad(x.float(), (0, -width % SPAN)).unflatten(1, (-1, SPAN))
    above, below = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    furthest = torch.where(above >= -below, above, below)
    up = torch.full_like(furthest, -128) / furthest  # not -128 / furthest, which multiplies by a rounded inverse
    numbers = torch.where(furthest == 0, 0, x * up).round().clamp_max(127).double()
    weight = F.pad(form.dequantise(tensors).double(), (0, -width % SPAN)).unflatten(1, (-1, SPAN))
    scale = tensors["scale"].double()[..., None]
    whole = (weight / scale).round()
    assert (whole * scale - weight).abs().max() <= 1e-5 * weight.abs().max() and whole.abs().max() <= 128
    sums = torch.einsum("ngk,mgk->nmg", numbers, whole)
    return (sums * (furthest / -128).double().squeeze(-1)[:, None] * scale.squeeze(-1)).sum(-1)


@compiled
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 70), st.integers(1, 400), st.integers(1, 200), st.booleans(), st.integers(0, 99))
def test_8_bits_are_the_definition(rows, width, outputs, biased, seed):
    """Any shape; in float32 nothing but the order of a few sums differs."""
    weight, x = random(outputs, width, seed=seed), random(rows, width, seed=seed + 1)
    bias = random(outputs, seed=seed + 2) if biased else None
    tensors = Int8().quantise(weight)
    expected = definition(Int8(), tensors, x) + (0 if bias is None else bias)
    layer = Int8().layer(tensors, bias, torch.float32)
    assert isinstance(layer, Int8Linear)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5 * width**0.5)
    narrow = Int8().layer(tensors, None if bias is None else bias.bfloat16(), torch.bfloat16)(x.bfloat16())
    expected = definition(Int8(), tensors, x.bfloat16()) + (0 if bias is None else bias.bfloat16())
    torch.testing.assert_close(narrow.double(), expected, rtol=2**-8, atol=1e-5 * width**0.5)


@compiled
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 3), st.sampled_from([32, 64, 128]), st.integers(0, 99))
def test_4_bits_are_the_definition(rows, groups, blocks, group_size, seed):
    """Every number, multiplier and offset that there is: weights as spread as 8 bits hold, and groups of one value."""
    form, width = Int4(group_size), groups * group_size
    weight, x = random(64 * blocks, width, seed=seed), random(rows, width, seed=seed + 1).bfloat16()
    weight *= torch.rand(64 * blocks, groups, generator=torch.Generator().manual_seed(seed)).repeat_interleave(
        group_size, 1
    )
    tensors = dict(form.quantise(weight + (seed % 3)))
    if seed % 2:  # what no quantiser writes
        tensors["int4"] = torch.randint(0, 256, tensors["int4"].shape, dtype=torch.uint8)
        tensors["groups"] = torch.randint(0, 112, tensors["groups"].shape, dtype=torch.uint8)
        tensors["groups"] -= tensors["groups"] % 16 // 8 * 8  # of at most 8 * 8 in size, and offsets from -26 to -2
    bias = random(64 * blocks, seed=seed + 2).bfloat16()
    expected = definition(form, tensors, x) + bias.double()
    layer = form.layer(tensors, bias, torch.bfloat16)
    assert isinstance(layer, Int4Linear)
    torch.testing.assert_close(layer(x).double(), expected, rtol=2**-8, atol=1e-4 * width**0.5)
    assert all(torch.equal(found, tensors[name]) for name, found in layer.tensors().items())


@compiled
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_token_does_not_depend_on_its_neighbours(form):
    """To the last bit, in batches of every size, whatever instructions those use and however many threads."""
    layer, x = layer_of(form, random(192, 384)), random(70, 384, seed=1).bfloat16()
    x[7] *= 1000  # an outlier that a scale for all of them would follow
    together = layer(x)
    for rows in (*range(1, 18), 31, 32, 33, 64):
        assert torch.equal(layer(x[3 : 3 + rows]), together[3 : 3 + rows]), rows
    assert torch.equal(layer(x.view(2, 35, 384)), together.view(2, 35, 192))
    wide = torch.cat([x, x], 1)
    assert torch.equal(layer(wide[:, 384:]), together) and torch.equal(layer(x.t().contiguous().t()), together)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(layer(x), together) and torch.equal(layer(x[:1]), together[:1])
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize(
    ("form", "outputs", "width", "rows"),
    [(Int4(128), 128, 16384, 100), (Int8(), 100, 4100, 600), (Int8(), 40, 16384, 40), (Int8(), 8, 1024, 1030)],
)
def test_more_than_is_quantised_at_a_time(form, outputs, width, rows):
    """Rows, and inputs of many rows, between which the totals wait."""
    layer, x = layer_of(form, random(outputs, width)), random(rows, width, seed=1).bfloat16()
    together = layer(x)
    assert all(torch.equal(layer(x[at : at + 1])[0], together[at]) for at in (0, 31, 32, rows // 2, rows - 1))


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("outputs", [1024, 1000])
def test_outputs_that_are_written_past_the_caches(dtype, outputs):
    """300,000 of them and more; those that are no whole lines are not."""
    layer = layer_of(Int8(), random(outputs, 128), random(outputs, seed=2).to(dtype), dtype)
    x = random(301, 128, seed=1).to(dtype)
    assert torch.equal(layer(x), torch.cat([layer(some) for some in x.split(40)]))


@pytest.mark.parametrize("form", [Int8(), Int4(32)], ids=str)
@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_in_its_row(form, rows, bad):
    """Integers have no NaN: without care it would become an ordinary number."""
    layer, x = layer_of(form, random(128, 256)), random(rows, 256, seed=1).bfloat16()
    clean = layer(x)
    x[1, 200] = bad
    y = layer(x)
    assert not y[1].isfinite().any()
    others = torch.arange(rows) != 1
    assert torch.equal(y[others], clean[others])


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library for pages")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("width", [128, 384])
def test_nothing_is_read_behind_the_weights(form, width):
    """Where the last span is one record, a page behind it that may not be read stays unread."""
    layer, x = layer_of(form, random(64, width)), random(20, width, seed=1).bfloat16()
    together, size = layer(x), layer._packed.numel()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    behind = ctypes.c_void_p(whole.data_ptr() + pages)
    protect = ctypes.CDLL(None).mprotect
    assert protect(behind, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    shape = layer._packed.shape
    layer._packed = whole[pages - size : pages].copy_(layer._packed.flatten()).view(shape)
    assert torch.equal(layer(x), together) and torch.equal(layer(x[:1]), together[:1])
    assert protect(behind, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE) == 0


@compiled
def test_small_and_large_activations():
    layer, x = layer_of(Int8(), random(64, 128), dtype=torch.float32), random(4, 128, seed=1)
    plain = layer(x)
    for size in (1e-25, 1e-12, 1e25):
        torch.testing.assert_close(layer(x * size) / size, plain, rtol=1e-4, atol=1e-4)
    assert not layer(torch.zeros(9, 128)).any() and not layer(torch.full((1, 128), 1e-40)).any()


@compiled
def test_torchs_own_tiles_are_left_as_they_were():
    """oneDNN configures the same registers of the processor."""
    weight, x = random(256, 256).bfloat16(), random(64, 256, seed=1).bfloat16()
    layer, expected = layer_of(Int8(), weight.float()), F.linear(x, weight)
    mine = layer(x)
    for _ in range(3):
        assert torch.equal(F.linear(x, weight), expected) and torch.equal(layer(x), mine)


@compiled
def test_what_does_not_fit_is_refused_and_not_read():
    layer = layer_of(Int4(32), random(64, 128))
    for x in (torch.zeros(1, 96, dtype=torch.bfloat16), torch.zeros(1, 128), torch.zeros(1, 128, device="meta")):
        with pytest.raises(ValueError, match=r"int4_32 weights of 64 x 128 take no"):
            layer(x)


@pytest.fixture
def without(monkeypatch):
    """No kernels of ours."""
    library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("LLAMA_INFER_NATIVE", "0")
        yield
    library.cache_clear()


@pytest.mark.parametrize(("form", "limit"), [(Int8(), 0.004), (Int4(32), 0.01), (Int4(128), 0.01)], ids=str)
def test_torchs_operators_give_the_same_but_for_rounding(without, form, limit):
    weight, bias, x = random(192, 416), random(192, seed=1).bfloat16(), random(70, 416, seed=2).bfloat16()
    weight = weight[:, :384] if form == FORMS[-1] or not isinstance(form, Int8) else weight
    x = x[:, : weight.shape[1]]
    tensors = form.quantise(weight)
    layer = form.layer(tensors, bias, torch.bfloat16)
    assert isinstance(layer, (Int8TorchLinear, Int4TorchLinear))
    expected = definition(form, tensors, x) + bias.double()
    assert ((layer(x).double() - expected).norm() / expected.norm()).item() < limit
    assert layer(x[None, :1]).shape == (1, 1, 192)
    found = layer.tensors()
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_saved_with_kernels_and_loaded_without_and_back(tmp_path, monkeypatch, form):
    """The same numbers on the disk."""
    write_checkpoint(tmp_path / "0", hidden_size=128, vocab_size=320, dtype="bfloat16", tie_word_embeddings=True)
    written = []
    for step, native in enumerate("101", 1):
        monkeypatch.setenv("LLAMA_INFER_NATIVE", native)
        library.cache_clear()
        folder, asked = str(tmp_path / str(step - 1)), form if step == 1 else None
        model = AutoLoader()(Source(folder, quantization=asked, device="cpu")).model
        assert weight_bytes(model) > 100_000 and model(IDS).logits.isfinite().all()
        (tmp_path / str(step)).mkdir()
        save_quantised(model, tmp_path / str(step))
        written.append((tmp_path / str(step) / "model.safetensors").read_bytes())
    library.cache_clear()
    assert written[0] == written[1] == written[2]


def test_another_versions_format_is_refused_by_name(tmp_path):
    write_checkpoint(tmp_path, hidden_size=128, dtype="bfloat16")
    described = {"quant_method": "llama_infer", "policy": "int8", "tied": False, "settings": {"activations": True}}
    edit_json(tmp_path / "config.json", quantization_config=described)
    with pytest.raises(LoadingError, match="another version of this library.*convert the original again"):
        AutoLoader()(Source(str(tmp_path), device="cpu"))
