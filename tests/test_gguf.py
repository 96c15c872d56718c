"""GGUF files, written with llama.cpp's own package: the oracle is the model that was written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import edit_json

from llama_infer import Pipeline
from llama_infer.cli import main
from llama_infer.errors import LoadingError, MissingDependencyError, UnsupportedError
from llama_infer.models import memory
from llama_infer.testing import byte_tokenizer, tiny_llama

IDS = torch.tensor([[256, 72, 101, 108, 108, 111, 3, 9]])
EIGHT_BITS = gguf.GGMLQuantizationType.Q8_0
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp turns neighbouring channels of q and k against each other, transformers the halves of a head."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(path: Path, model: Any, kind: Any = None, tokenizer: bool = True, **flags: bool) -> Path:
    """A Llama as llama.cpp's converter writes it."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        tokens = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list([*(token for token, _ in tokens), "he", "ll"])
        writer.add_token_types([1] * 256 + [3] * (len(tokens) - 256) + [1, 1])
        writer.add_token_merges(["h e", "l l"])
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
        for name, value in flags.items():
            getattr(writer, name)(value)
    for name, tensor in model.state_dict().items():
        stem, prefix = name.removesuffix(".weight"), ""
        if stem.startswith("model.layers."):
            number, stem = stem.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{number}."
        array = tensor.numpy()
        if stem.endswith(("q_proj", "k_proj")):
            array = interleaved(array, config.num_attention_heads if "q_" in stem else config.num_key_value_heads)
        quantised = kind is not None and array.ndim == 2
        content = gguf.quants.quantize(array, kind) if quantised else array
        writer.add_tensor(f"{prefix}{NAMES[stem]}.weight", content, raw_dtype=kind if quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=266)


@pytest.fixture(scope="module")
def file(tmp_path_factory, model):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", model)


def load(path: Path, **options: Any) -> Pipeline:
    return Pipeline(str(path), **{"dtype": "float32", **options})


def test_logits_are_those_of_the_model(file, model, capfd):
    capfd.readouterr()
    pipe = load(file)
    assert torch.equal(pipe.loaded.model(IDS).logits, model(IDS).logits)
    assert "".join(capfd.readouterr()) == "", "loading is silent"
    assert pipe.loaded.context_length == 512 and pipe.loaded.end_token_ids == (257, 260)
    assert load(file).loaded is pipe.loaded
    assert load(file.parent).loaded.model(IDS).logits.equal(model(IDS).logits), "a folder that has nothing else"
    assert Pipeline(str(file)).loaded.model.dtype == torch.bfloat16 and pipe("Hi", max_new_tokens=3).token_ids


def test_quantised_blocks_are_unpacked(tmp_path, model):
    loaded = load(write_gguf(tmp_path / "q8.gguf", model, EIGHT_BITS)).loaded.model
    for name, tensor in model.state_dict().items():
        weight = loaded.state_dict()[name]
        if tensor.ndim == 2:
            blocks = gguf.quants.quantize(tensor.numpy(), EIGHT_BITS)  # rows of 32: the order of rows does not matter
            tensor = torch.from_numpy(gguf.quants.dequantize(blocks, EIGHT_BITS))
        assert torch.equal(weight, tensor), name


def test_its_tokenizer(file, tmp_path, model):
    """It begins with its first token, where the file does not forbid it, and has no token without an embedding."""
    tokenizer = load(file).loaded.tokenizer
    assert tokenizer("hello 你<|eot_id|>").input_ids == [256, 264, 265, ord("o"), 32, *"你".encode(), 260]
    assert tokenizer.decode([264, 265, ord("o"), *"你".encode()]) == "hello你"
    assert max(tokenizer.get_vocab().values()) == 265
    without = load(write_gguf(tmp_path / "a.gguf", model, add_add_bos_token=False)).loaded.tokenizer
    assert without("h").input_ids == [ord("h")]
    assert load(write_gguf(tmp_path / "b.gguf", model, tokenizer=False)).loaded.tokenizer is None


def test_convert_makes_safetensors_of_it(file, tmp_path, model):
    assert main(["convert", str(file), str(tmp_path / "new")]) == 0
    loaded = load(tmp_path / "new").loaded
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)
    assert loaded.tokenizer("hello").input_ids == [256, 264, 265, ord("o")]
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("length", [-1000, 2000, 30, 3, 0])
def test_truncated_or_something_else(file, tmp_path, length):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:length])
    with pytest.raises(LoadingError, match="damaged.gguf is damaged") as caught:
        load(damaged)
    assert "\n" not in str(caught.value)


def test_what_does_not_go_with_it(file, tmp_path, monkeypatch):
    with pytest.raises(UnsupportedError, match="bnb-int8.*GGUF"):
        load(file, quantization="bnb-int8")
    beside = tmp_path / "x.gguf"
    beside.write_bytes(file.read_bytes())
    edit_json(tmp_path / "adapter_config.json", peft_type="LORA")
    with pytest.raises(LoadingError, match="holds an adapter"):
        load(beside)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    with pytest.raises(MissingDependencyError, match=r"pip install 'llama-infer\[gguf\]'"):
        load(file, dtype="float64")


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_memory_is_compared_with_what_is_unpacked(tmp_path, monkeypatch, quantization):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), EIGHT_BITS)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * path.stat().st_size)
    with pytest.raises(LoadingError, match="does not fit: its weights are .* in float32"):
        Pipeline(path, dtype="float32", device="cpu", quantization=quantization)
