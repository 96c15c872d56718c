"""8 and 4 bits of our own: the arithmetic is that of the weights they stand for, and a token's is its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import write_checkpoint
from safetensors.torch import load_file

from llama_infer import Pipeline
from llama_infer.errors import ParameterError, UnsupportedError
from llama_infer.models.int4 import Int4, Int4Linear
from llama_infer.models.int8 import Int8, Int8Linear, _exact_products
from llama_infer.models.loaders import AutoLoader
from llama_infer.models.quantised import QuantisedEmbedding, QuantisedLinear
from llama_infer.parts import Source

IDS = torch.tensor([[256, *b"Why must we reduce pollution?"]])
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not _exact_products(), reason="needs VNNI")
FORMS = [Int8(), Int8(activations=False), Int4(32), Int4(64), Int4(128)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    return write_checkpoint(folder, hidden_size=128, vocab_size=320, dtype="bfloat16", tie_word_embeddings=True)


def load(folder, quantization="none", **options):
    return AutoLoader()(Source(str(folder), quantization=quantization, device="cpu", **options)).model


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(form, weight, bias=None, dtype=torch.bfloat16):
    return form.layer(form.quantise(weight), bias, dtype)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_a_layer_computes_with_the_weights_it_stands_for(form, rows):
    weight, bias, x = random(192, 256), random(192, seed=1).bfloat16(), random(2, rows, 256, seed=2).bfloat16()
    layer = layer_of(form, weight, bias)
    stands_for = form.dequantise(form.quantise(weight))
    assert torch.equal(layer.weight, stands_for.bfloat16())
    exact = F.linear(x.double(), stands_for.double(), bias.double())
    assert relative(layer(x), exact) < (0.008 if getattr(form, "activations", True) else 0.004)
    assert layer(x).shape == (2, rows, 192) and layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x[:, -1:]), layer(x[:, -1:].contiguous()))  # as ``logits_to_keep`` slices it


@pytest.mark.parametrize(
    ("form", "limit"), [(Int8(), 0.01), (Int8(activations=False), 0.009), (Int4(32), 0.078), (Int4(128), 0.095)]
)
def test_error_on_random_layers(form, limit):
    """Normal weights, the hardest of the usual, and nn.Linear's own (uniform)."""
    weight, x = random(512, 1024), random(32, 1024, seed=1).bfloat16()
    exact = F.linear(x.double(), weight.double())
    assert 0.001 < relative(layer_of(form, weight)(x), exact) < limit
    linear = torch.nn.init.kaiming_uniform_(
        torch.empty_like(weight), a=5**0.5, generator=torch.Generator().manual_seed(2)
    )
    if isinstance(form, Int8):
        assert relative(layer_of(form, linear)(x), F.linear(x.double(), linear.double())) < 0.01


@pytest.mark.parametrize("shape", [(512, 1024), (512, 2048), (1024, 4096)], ids=str)
def test_error_of_8_bits_in_every_draw(shape):
    """In float32 each is below 1 %, in bfloat16 their mean: rounding the outputs, 0.17 %, is in it."""
    found = []
    for seed in range(5):
        weight, x = random(*shape, seed=2 * seed), random(128, shape[1], seed=2 * seed + 1)
        tensors, rounded = Int8().quantise(weight), x.bfloat16()
        wide, narrow = (Int8().layer(tensors, None, dtype) for dtype in (torch.float32, torch.bfloat16))
        assert 0.009 < relative(wide(x), F.linear(x.double(), weight.double())) < 0.0099
        found.append(relative(narrow(rounded), F.linear(rounded.double(), weight.double())))
    assert sum(found) / len(found) < 0.01


def test_int8_products_do_not_overflow():
    weight, x = torch.full((64, 4096), 127 / 128), torch.full((1, 4096), 127.0)
    for sign in (1, -1):
        expected = torch.full((1, 64), sign * 4096 * 127 * 127 / 128)
        torch.testing.assert_close(layer_of(Int8(), sign * weight, dtype=torch.float32)(x), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", [Int8(), Int4(32)], ids=str)
def test_rows_of_zeros_and_what_is_not_finite(form):
    layer = layer_of(form, torch.cat([torch.zeros(1, 128), random(63, 128)]))
    x = random(3, 128, seed=1).bfloat16()
    x[0], x[1, 5] = 0, float("nan")
    y = layer(x)
    assert not y[0].any() and abs(y[2, 0]) < 1e-20 and y[1].isnan().any() and y[2].isfinite().all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_quantising_what_was_quantised_changes_nothing_in_8_bits_and_little_in_4(form):
    once = form.dequantise(form.quantise(random(64, 256)))
    again = form.dequantise(form.quantise(once))
    assert torch.allclose(again, once, rtol=1e-6) if isinstance(form, Int8) else relative(again, once) < 0.01


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model(tmp_path, form, tied):
    write_checkpoint(tmp_path, hidden_size=128, vocab_size=320, dtype="bfloat16", tie_word_embeddings=tied)
    model, plain = load(tmp_path, form), load(tmp_path)
    layers = {name for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    assert {name for name, module in plain.named_modules() if type(module) is torch.nn.Linear} <= layers
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantisedEmbedding) == tied and model.dtype == torch.bfloat16
    if tied:
        assert torch.equal(embedding(IDS), F.embedding(IDS, model.lm_head.weight))
        assert torch.equal(embedding.weight, model.lm_head.weight)
    reference = load(tmp_path)
    for name, module in model.named_modules():
        if isinstance(module, (QuantisedLinear, QuantisedEmbedding)):
            reference.get_submodule(name).weight.data = module.weight
    assert relative(model(IDS).logits, reference(IDS).logits) < 0.1
    assert str(form) in repr(model)


@pytest.mark.parametrize("form", [Int8(), Int4()], ids=str)
def test_save_pretrained_writes_the_dequantised_weights(tmp_path, folder, form):
    model = load(folder, form)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    plain = load_file(folder / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in held.items()} == {n: (t.shape, t.dtype) for n, t in plain.items()}
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(held[name + ".weight"], model.get_submodule(name).weight)
    assert relative(load(tmp_path)(IDS).logits, model(IDS).logits) < 0.1


def test_layers_can_be_kept_whole(folder):
    model = load(folder, Int8(keep=("lm_head",)))
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].mlp.up_proj, Int8Linear)


def test_int4_leaves_what_does_not_fit(tmp_path):
    write_checkpoint(tmp_path, hidden_size=96, vocab_size=264, dtype="bfloat16")
    model = load(tmp_path, Int4(64))
    mlp = model.model.layers[0].mlp
    assert type(mlp.up_proj) is torch.nn.Linear and isinstance(mlp.down_proj, Int4Linear) is False
    assert isinstance(load(tmp_path, Int4(32)).model.layers[0].mlp.up_proj, Int4Linear)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_decodes_by_name(folder, name):
    pipe = Pipeline(str(folder), device="cpu", quantization=name, params={"temperature": 0, "max_new_tokens": 6})
    alone = pipe("Hello", min_new_tokens=6)
    assert len(alone.token_ids) == 6
    assert len(pipe(["Hello", "Why?", "Who"], min_new_tokens=6)) == 3


def test_float32_int8(folder):
    assert relative(load(folder, "int8", dtype="float32")(IDS).logits, load(folder, dtype="float32")(IDS).logits) < 0.1


@pytest.mark.parametrize(
    ("form", "device", "dtype", "message"),
    [
        (Int8(), "cuda", torch.bfloat16, "'int8' is for the CPU, not cuda.*bnb-int8"),
        (Int8(), "cpu", torch.float16, "'int8' works in bfloat16 and float32, not torch.float16"),
        (Int4(), "cuda", torch.bfloat16, "'int4' is for the CPU, not cuda.*bnb-nf4"),
        (Int4(), "cpu", torch.float32, "'int4' works in bfloat16, not torch.float32"),
    ],
)
def test_refusals(form, device, dtype, message):
    with pytest.raises(UnsupportedError, match=message):
        form.check(torch.device(device), dtype)


def test_group_size_is_checked():
    with pytest.raises(ParameterError, match="group_size=48.*32, 64, 128"):
        Int4(group_size=48)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_peaks_at_the_result_while_loading(tmp_path):
    """What loading and a first token, which reads what is mapped, add to a process at its height: the result and the
    largest layer, here a tied head of 64 MB."""
    sizes = {"hidden_size": 512, "intermediate_size": 8192, "num_layers": 3, "vocab_size": 64 * 1024}
    write_checkpoint(tmp_path, dtype="bfloat16", tokenizer=False, tie_word_embeddings=True, **sizes)
    root = str(Path(__file__).resolve().parent.parent)
    code = f"""
import ctypes, gc, sys; sys.path.insert(0, {root!r})
import torch
from llama_infer.models.int4 import Int4
from llama_infer.models.loaders import AutoLoader
from llama_infer.parts import Source
def memory(kind):
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))
    return int(fields[kind].split()[0]) << 10
def load(policy):
    return AutoLoader()(Source({str(tmp_path)!r}, device="cpu", quantization=policy)).model
load("none")
for policy in "packed", "int8", Int4(128):
    gc.collect(), ctypes.CDLL(None).malloc_trim(0)  # what the last one left must not serve the next one
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from now
    before = memory("VmRSS")
    model = load(policy)
    model(torch.zeros(1, 1, dtype=torch.int64))
    print(memory("VmHWM") - before)
    del model
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, largest = (tmp_path / "model.safetensors").stat().st_size, 64 << 20
    for added, limit in zip(map(int, done.stdout.split()), (1.1, 0.6, 0.4), strict=True):
        assert 0.2 * size < added < limit * size + largest, (added / size, limit)
