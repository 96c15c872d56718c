"""A quantised model comes back from the disk as it was, and nothing quantises it twice."""

from __future__ import annotations

import pytest
import torch
from checkpoints import edit_header, edit_json, write_checkpoint

from llama_infer import Pipeline
from llama_infer.errors import LoadingError, UnsupportedError
from llama_infer.models.convert import convert
from llama_infer.models.int4 import Int4
from llama_infer.models.int8 import Int8, _exact_products
from llama_infer.models.loaders import AutoLoader
from llama_infer.models.saved import save_quantised
from llama_infer.parts import Source

IDS = torch.tensor([[256, *b"Why must we reduce pollution?"]])
pytestmark = pytest.mark.skipif(not _exact_products(), reason="needs VNNI")
POLICIES = ["int8", Int8(activations=False, keep=("lm_head",)), "int4", Int4(64, keep=("o_proj",))]


def load(folder, quantization=None, **options):
    return AutoLoader()(Source(str(folder), quantization=quantization, device="cpu", **options)).model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_round_trip_is_exact(tmp_path, policy, tied):
    write_checkpoint(tmp_path / "a", hidden_size=128, vocab_size=320, dtype="bfloat16", tie_word_embeddings=tied)
    before = load(tmp_path / "a", policy)
    (tmp_path / "b").mkdir()
    save_quantised(before, tmp_path / "b")
    after = load(tmp_path / "b")
    assert torch.equal(after(IDS).logits, before(IDS).logits)
    first, second = before.state_dict(), after.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in "ab"]
    assert sizes[1] < 0.75 * sizes[0]
    assert not hasattr(before.config, "quantization_config")
    (tmp_path / "c").mkdir()
    save_quantised(after, tmp_path / "c")
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes() for name in names)


def test_converted_to_int8_and_used(tmp_path):
    write_checkpoint(tmp_path / "a", hidden_size=128, dtype="bfloat16", tie_word_embeddings=True)
    convert(tmp_path / "a", tmp_path / "b", quantization="int8")
    params = {"temperature": 0, "max_new_tokens": 8}
    fresh = Pipeline(str(tmp_path / "a"), quantization="int8", device="cpu", params=params)
    saved = Pipeline(str(tmp_path / "b"), device="cpu", params=params)
    assert saved("Hello").token_ids == fresh("Hello").token_ids
    assert saved.loaded.end_token_ids == fresh.loaded.end_token_ids
    for twice in ("int4", "int8", "bnb-nf4", "packed"):
        with pytest.raises(UnsupportedError, match=r"already quantised \(llama_infer\)"):
            saved.replace(quantization=twice)


def test_what_is_not_quantised_is_not_saved_so(tmp_path):
    write_checkpoint(tmp_path / "a", hidden_size=128, dtype="bfloat16")
    (tmp_path / "b").mkdir()
    with pytest.raises(UnsupportedError, match="save_pretrained"):
        save_quantised(load(tmp_path / "a", "none"), tmp_path / "b")
    assert not any((tmp_path / "b").iterdir())


@pytest.mark.parametrize("policy", ["packed", "none", "bnb-nf4"])
def test_policies_that_are_not_saved_are_refused_before_anything_is_read(tmp_path, policy):
    with pytest.raises(UnsupportedError, match=f"'{policy}' is not one that is saved; int8 and int4 are"):
        convert(tmp_path / "nowhere", tmp_path / "b", quantization=policy)


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "a", hidden_size=128, dtype="bfloat16")
    convert(tmp_path / "a", tmp_path / "b", quantization="int8")
    return tmp_path / "b"


def test_a_missing_tensor(folder):
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    del held["model.norm.weight"]
    save_file(held, folder / "model.safetensors")
    with pytest.raises(LoadingError, match=r"1 tensors are missing \(model.norm.weight\)"):
        load(folder)


def test_another_shape(folder):
    edit_json(folder / "config.json", intermediate_size=512)
    with pytest.raises(LoadingError, match="256 x 128 in the file|128 x 256 in the file"):
        load(folder)


def test_unknown_names(folder):
    def rename(header):
        header["model.layers.7.mlp.up_proj.int8"] = header.pop("model.layers.1.mlp.up_proj.int8")

    edit_header(folder / "model.safetensors", rename)
    with pytest.raises(LoadingError, match="do not fit its config.json"):
        load(folder)


@pytest.mark.parametrize("settings", [{"colour": 1}, [1]])
def test_settings_that_make_no_policy(folder, settings):
    edit_json(
        folder / "config.json",
        quantization_config={"quant_method": "llama_infer", "version": 3, "policy": "int8", "settings": settings},
    )
    with pytest.raises(LoadingError, match="quantization_config is damaged"):
        load(folder)


def test_not_for_other_devices(folder):
    with pytest.raises(UnsupportedError, match="device_map"):
        AutoLoader()(Source(str(folder), device_map="auto"))
