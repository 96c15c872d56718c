"""Checkpoints of compressed-tensors, written by its own package: their weights are what it says that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json, write_checkpoint
from oracles import greedy
from safetensors.torch import load_file, save_file

from llama_infer import Pipeline
from llama_infer.errors import UnsupportedError
from llama_infer.models.checks import check_checkpoint
from llama_infer.models.packed import refusal

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
GROUP = 32
CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel"}
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a16": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}),
    "w8a16": ("pack-quantized", CHANNEL),
    "w8a8": ("int-quantized", CHANNEL),
    "fp8": ("float-quantized", {**CHANNEL, "type": "float"}),
}
ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def quantise(folder: Path, kind: str) -> None:
    """Compresses a checkpoint where it is, but for its head."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
    from transformers import AutoModelForCausalLM

    form, weights = SCHEMES[kind]
    activations = ACTIVATIONS if kind == "w8a8" else None
    scheme = QuantizationScheme(
        targets=["Linear"], weights={**weights, "symmetric": True}, input_activations=activations
    )
    settings = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], format=form, quantization_status="compressed"
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    apply_quantization_config(model, settings)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.data.unflatten(1, (module.weight_scale.shape[1], -1))
            module.weight_scale.data.copy_(groups.abs().amax(-1) / {"w4a16": 7, "fp8": 448}.get(kind, 127))
    ModelCompressor(quantization_config=settings).compress_model(model)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    described = {**json.loads(settings.model_dump_json()), "quant_method": "compressed-tensors"}
    edit_json(folder / "config.json", quantization_config=described)


def stands_for(held: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """float32 [out, in]: 8-bit numbers as they are, or four or eight to an int32, lowest first, the middle being zero;
    times scales."""
    scale = held[f"{name}.weight_scale"].float()
    if f"{name}.weight" in held:
        numbers = held[f"{name}.weight"].float()
    else:
        bits = 8 if scale.shape[1] == 1 else 4
        packed = held[f"{name}.weight_packed"][..., None] >> bits * torch.arange(32 // bits)
        numbers = (packed & (1 << bits) - 1).flatten(1).float() - (1 << bits - 1)
    return (numbers.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


@pytest.mark.parametrize("kind", SCHEMES)
def test_weights_and_tokens_are_those_of_the_unpacked_model(tmp_path, kind, capfd):
    from transformers import AutoModelForCausalLM

    write_checkpoint(tmp_path / "whole", hidden_size=128, dtype="bfloat16")
    write_checkpoint(tmp_path / "quantised", hidden_size=128, dtype="bfloat16")
    quantise(tmp_path / "quantised", kind)
    held = load_file(tmp_path / "quantised" / "model.safetensors")
    names = [name.removesuffix(".weight_scale") for name in held if name.endswith(".weight_scale")]
    assert len(names) == 14
    capfd.readouterr()
    pipe = Pipeline(str(tmp_path / "quantised"), device="cpu", dtype="float32", formatter="plain")
    assert "".join(capfd.readouterr()) == ""
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert check_checkpoint(tmp_path / "quantised").numbers == oracle.num_parameters()
    for name in names:
        found, whole = (model.get_submodule(name).weight for model in (pipe.loaded.model, oracle))
        assert torch.allclose(found, stands_for(held, name), rtol=2**-8, atol=0) and not torch.equal(found, whole)
        whole.data = found.data
    prompt = [256, *b"Why?"]
    answer = pipe(prompt, temperature=0, max_new_tokens=8)
    assert answer.token_ids == greedy(oracle.eval(), prompt, 8, eos_token_id=[257, 260])


def test_unpacked_layers_are_packed_and_not_quantised_again(tmp_path):
    write_checkpoint(tmp_path, hidden_size=128, dtype="bfloat16")
    quantise(tmp_path, "w4a16")
    layer = Pipeline(str(tmp_path), device="cpu").loaded.model.model.layers[0].mlp.up_proj
    here = refusal(torch.device("cpu"), torch.bfloat16) is None
    assert (type(layer) is torch.nn.Linear) != here
    with pytest.raises(UnsupportedError, match="already quantised \\(compressed-tensors\\)"):
        Pipeline(str(tmp_path), device="cpu", quantization="int8")
