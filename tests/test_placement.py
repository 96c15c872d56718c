"""Where a model goes and how it computes there: dtypes, devices, layers on the disk, kernels for attention."""

from __future__ import annotations

import pytest
import torch
from checkpoints import IDS, edit_json, load, write_checkpoint
from oracles import greedy

from llama_infer import Pipeline
from llama_infer.errors import LoadingError, MissingDependencyError, ParameterError, UnsupportedError
from llama_infer.models import devices, loaders
from llama_infer.testing import tiny_llama


def test_default_dtype_is_bfloat16_and_said(whole):
    loaded = load(whole)
    assert loaded.model.dtype == torch.bfloat16
    assert len(loaded.notes) == 1 and "float32" in loaded.notes[0]


@pytest.mark.parametrize(
    ("stored", "asked", "got", "notes"),
    [
        ("bfloat16", None, torch.bfloat16, 0),
        ("bfloat16", "auto", torch.bfloat16, 0),
        ("float32", "auto", torch.float32, 0),
        ("float16", None, torch.bfloat16, 1),
        ("float16", "auto", torch.bfloat16, 1),
        ("float16", "float16", torch.float16, 0),
        ("bfloat16", "fp32", torch.float32, 0),
        ("float32", "half", torch.float16, 0),
    ],
)
def test_dtypes_on_the_cpu(tmp_path, stored, asked, got, notes):
    loaded = load(write_checkpoint(tmp_path, tokenizer=False, dtype=stored), dtype=asked, device="cpu")
    assert loaded.model.dtype == got
    assert len(loaded.notes) == notes
    assert torch.isfinite(loaded.model(IDS).logits).all()


def test_dtype_names():
    assert [devices.dtype_name(n) for n in ("bf16", "fp16", "float", "torch.float32")] == [
        "bfloat16", "float16", "float32", "float32"
    ]  # fmt: skip
    with pytest.raises(ParameterError, match="did you mean 'bfloat16'"):
        load("demo", dtype="bfloat1")
    with pytest.raises(ParameterError, match="quantization"):
        load("demo", dtype="int8")


def test_default_dtype_of_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (int(device.index), 5))
    assert devices.default_dtype(torch.device("cuda:8")) == "bfloat16"
    assert devices.default_dtype(torch.device("cuda:7")) == "float16"
    assert devices.default_dtype(torch.device("cpu")) == "bfloat16"


def test_devices_are_picked_in_order(monkeypatch):
    cuda, mps = [0], [False]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda[0] > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda[0])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps[0])
    assert devices.pick_device() == torch.device("cpu")
    mps[0] = True
    assert devices.pick_device() == torch.device("mps")
    cuda[0] = 2
    assert devices.pick_device() == torch.device("cuda:1")  # the current one
    assert devices.pick_device("cuda:0") == torch.device("cuda:0")
    assert devices.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ParameterError, match="cuda:2.*cuda:0, cuda:1, mps, cpu"):
        devices.pick_device("cuda:2")
    cuda[0], mps[0] = 0, False
    for absent in ("cuda", "cuda:1", "mps", "tpu", ""):
        with pytest.raises(ParameterError, match="Here: cpu"):
            devices.pick_device(absent)


def test_device_and_device_map(whole):
    loaded = load(whole, device_map="auto", dtype="float32")
    assert loaded.device == loaded.model.get_input_embeddings().weight.device
    assert torch.allclose(loaded.model(IDS.to(loaded.device)).logits.cpu(), tiny_llama()(IDS).logits, atol=1e-4)
    assert load(whole, device_map={"": "cpu"}).device == torch.device("cpu")
    with pytest.raises(UnsupportedError, match="device_map"):
        load(whole, device="cpu", device_map="auto")


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # says accelerate, and goes on
def test_a_device_map_with_a_name_that_no_module_has(whole):
    with pytest.raises(ParameterError, match="no module 'model.layer.1'; did you mean 'model.layers.1'"):
        load(whole, device_map={"": "cpu", "model.layer.1": "disk"})


@pytest.mark.parametrize("place", [{"": "disk"}, {"model": "cpu", "lm_head": "disk"}])
def test_layers_on_the_disk(whole, place, capfd):
    """Rows in one packed forward, through layers that accelerate fetches: the tokens are those of the whole model."""
    capfd.readouterr()
    pipe = Pipeline(str(whole), device_map=place, dtype="float32", formatter="plain")
    assert "".join(capfd.readouterr()) == ""
    assert any(parameter.device.type == "meta" for parameter in pipe.loaded.model.parameters())
    assert pipe.loaded.device.type == "cpu" and "on the disk" in pipe.loaded.notes[-1]
    prompts = [[256, 72, 105], list(range(40, 70))]
    for prompt, answer in zip(prompts, pipe(prompts, temperature=0, max_new_tokens=6), strict=True):
        assert answer.token_ids == greedy(tiny_llama(), prompt, 6, eos_token_id=[257, 260])


def test_attention_kernels(whole, monkeypatch):
    for name in ("sdpa", "eager"):
        loaded = load(whole, attention=name, device="cpu")
        assert loaded.attention == loaded.model.config._attn_implementation == name
    assert load(whole, device="cpu").attention == "sdpa"
    with pytest.raises(ParameterError, match="did you mean 'sdpa'"):
        load(whole, attention="spda")
    with pytest.raises(UnsupportedError, match="use 'sdpa'"):
        load(whole, attention="flash_attention_2", device="cpu")
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(loaders.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install flash-attn.*sdpa"):
        loaders._pick_attention("flash_attention_2", cuda, torch.bfloat16)
    monkeypatch.setattr(loaders.importlib.util, "find_spec", lambda name: name)
    assert loaders._pick_attention("flash_attention_2", cuda, torch.bfloat16) == "flash_attention_2"
    with pytest.raises(UnsupportedError, match="float32"):
        loaders._pick_attention("flash_attention_2", cuda, torch.float32)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_the_kernel_of_the_config_does_not_win(folder, field):
    edit_json(folder / "config.json", **{field: "flash_attention_2"})
    assert load(folder, device="cpu").attention == "sdpa"
    assert load(folder, device="cpu", attention="eager").attention == "eager"


def test_a_model_without_sdpa_falls_back_to_eager(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    assert load(tmp_path, device="cpu").attention == "eager"
    with pytest.raises(LoadingError, match="Gemma2"):
        load(tmp_path, device="cpu", attention="sdpa")
