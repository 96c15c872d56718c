"""Layers laid out for the processor: the same numbers, faster, and a model that still saves as what it was."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

from llama_infer import Pipeline
from llama_infer.errors import ParameterError, UnsupportedError
from llama_infer.models.loaders import AutoLoader
from llama_infer.models.mapped import release
from llama_infer.models.native import tiled
from llama_infer.models.packed import Packed, PackedLinear, TiledLinear, refusal
from llama_infer.parts import Source
from llama_infer.testing import tiny_llama

IDS = torch.tensor([[256, *b"Why must we reduce pollution?"]])
HERE = refusal(torch.device("cpu"), torch.bfloat16)
needs_packing = pytest.mark.skipif(HERE is not None, reason=f"packing {HERE}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("packed"), hidden_size=128, dtype="bfloat16")


@pytest.fixture(params=["tiles", "onednn"])
def kind(request, monkeypatch):
    """The layers that the policy makes: of a processor with tiles, where this is one, and of any other."""
    if request.param == "onednn":
        monkeypatch.setattr(tiled, "available", lambda: False)
        return PackedLinear
    if not tiled.available():
        pytest.skip("no tiles, or no compiler")
    return TiledLinear


def load(folder, quantization=None, **options):
    return AutoLoader()(Source(str(folder), quantization=quantization, device="cpu", **options)).model


def packed_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, (PackedLinear, TiledLinear))}


@needs_packing
@pytest.mark.parametrize("rows", [1, 7, 20, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_is_the_layer(rows, bias, kind):
    with torch.random.fork_rng():
        torch.manual_seed(rows)
        linear = torch.nn.Linear(192, 320, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
        x = torch.randn(2, rows, 192, dtype=torch.bfloat16)
    packed = kind(linear) if kind is TiledLinear else kind(linear.weight, linear.bias)
    exact = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert torch.allclose(packed(x).double(), exact, rtol=2**-8, atol=2**-8)  # one rounding to bfloat16
    assert torch.equal(packed.weight, linear.weight)


@needs_packing
def test_few_numbers_of_rows_are_asked_of_onednn(monkeypatch):
    """It compiles for each; a file of prompts has them all."""
    asked, plain = set(), PackedLinear._product
    monkeypatch.setattr(PackedLinear, "_product", lambda self, x: asked.add(x.shape) or plain(self, x))
    packed = PackedLinear(torch.randn(64, 128).bfloat16())
    whole = torch.randn(1, 200, 128).bfloat16()
    expected = packed(whole)
    for rows in range(33, 201):
        torch.testing.assert_close(packed(whole[:, :rows]), expected[:, :rows])
    assert {shape.numel() // 128 for shape in asked} == {64, 96, 128, 160, 192, 224}


@needs_packing
@pytest.mark.parametrize("tied", [True, False])
def test_the_default_packs_every_linear_layer_and_changes_nothing_else(tmp_path, tied, kind):
    write_checkpoint(tmp_path, hidden_size=128, dtype="bfloat16", tie_word_embeddings=tied)
    plain, packed = load(tmp_path, "none"), load(tmp_path)
    linears = {name for name, module in plain.named_modules() if type(module) is torch.nn.Linear}
    assert packed_layers(packed) == linears and "lm_head" in linears and not packed_layers(plain)
    ours, theirs = packed(IDS).logits, plain(IDS).logits
    exact = copy.deepcopy(plain).float()(IDS).logits
    assert (ours - exact).norm() < 1.2 * (theirs - exact).norm()  # it rounds elsewhere, but no more
    before, after = plain.state_dict(), packed.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert f"{kind.__name__}(in_features=128" in repr(packed) and packed.dtype == torch.bfloat16


@needs_packing
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_model_saves_as_the_plain_one(tmp_path, tied, kind):
    write_checkpoint(tmp_path / "a", hidden_size=128, dtype="bfloat16", tie_word_embeddings=tied)
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(load(tmp_path / "b")(IDS).logits, load(tmp_path / "a")(IDS).logits)


@needs_packing
def test_layers_can_be_kept(folder, kind):
    model = load(folder, Packed(keep=("lm_head", "mlp.down_proj")))
    assert type(model.lm_head) is type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert len(packed_layers(model)) == 2 * 6
    assert repr(Packed(keep=("lm_head",))) == "Packed(keep=('lm_head',))"
    with pytest.raises(ParameterError, match="called 'head'.*lm_head"):
        load(folder, Packed(keep=("head",)))


@needs_packing
def test_what_is_not_bfloat16_or_too_small_stays(tmp_path, folder):
    assert not packed_layers(load(folder, dtype="float32"))
    small = load(write_checkpoint(tmp_path, hidden_size=32, num_kv_heads=1, dtype="bfloat16"), "packed")
    assert "model.layers.0.self_attn.q_proj" not in packed_layers(small)
    model = tiny_llama(hidden_size=128, dtype="bfloat16")
    Pipeline(model)  # the caller's own object
    assert not packed_layers(model)


@needs_packing
def test_a_packed_model_decodes(folder):
    packed = Pipeline(str(folder), device="cpu", quantization="packed", params={"temperature": 0, "max_new_tokens": 8})
    assert len(packed("Hello", min_new_tokens=8).token_ids) == 8 and "quantization" not in packed.explain()
    assert packed.replace(quantization=None).loaded is not packed.loaded


def test_packing_is_refused_by_name(folder):
    with pytest.raises(UnsupportedError, match="quantization='packed' works in bfloat16, not torch.float32") as error:
        load(folder, "packed", dtype="float32")
    assert "quantization='none'" in str(error.value)
    with pytest.raises(UnsupportedError, match="not cuda"):
        Packed().check(torch.device("cuda"), torch.bfloat16)


def test_release_changes_no_value(tmp_path):
    numbers = torch.arange(1 << 16, dtype=torch.float32)
    save_file({"a": numbers, "b": numbers + 1}, tmp_path / "x.safetensors")
    held = load_file(tmp_path / "x.safetensors")
    held["b"][5] = -1.0  # written to: no longer what is in the file
    for tensor in (*held.values(), numbers):
        release(tensor)
    assert torch.equal(held["a"], torch.arange(1 << 16, dtype=torch.float32)) and torch.equal(numbers, held["a"])
    assert held["b"][5] == -1.0 and held["b"][6] == 7.0
