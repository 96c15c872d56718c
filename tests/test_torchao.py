"""torchao's quantizations by name: they run, they are the arithmetic of their weights, what fails is refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from llama_infer import Pipeline
from llama_infer.errors import MissingDependencyError, ParameterError, UnsupportedError
from llama_infer.models.loaders import AutoLoader
from llama_infer.parts import Source
from llama_infer.registry import resolve

IDS = torch.tensor([[256, *b"Why must we reduce pollution?"]])
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("torchao"), hidden_size=128, dtype="bfloat16")


def load(folder, quantization):
    return AutoLoader()(Source(str(folder), quantization=quantization, device="cpu")).model


@needs_torchao
@pytest.mark.parametrize("config", ["int8_weight_only", "IntxWeightOnlyConfig", "float8_weight_only"])
def test_a_config_by_name_is_the_arithmetic_of_its_weights(folder, config):
    whole, model = load(folder, "none"), load(folder, f"torchao:{config}")
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer.weight.data).__module__.startswith("torchao.") and type(model.lm_head.weight.data) is torch.Tensor
    quantised, before = model(IDS).logits.double(), whole(IDS).logits.double()
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and name != "lm_head":
            whole.get_submodule(name).weight.data = module.weight.dequantize().to(torch.bfloat16)
    dequantised = whole(IDS).logits.double()
    error, loss = ((x - dequantised).norm() / dequantised.norm() for x in (quantised, before))
    assert error < 0.025 < loss < 0.2


@needs_torchao
def test_a_config_object_with_other_settings(folder):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    from llama_infer.models.torchao import TorchAO

    policy = TorchAO(Int8DynamicActivationInt8WeightConfig())
    pipe = Pipeline(str(folder), quantization=policy, device="cpu", formatter="plain")
    prompts = ["Hi", "What is a llama, and why?"]
    together = pipe(prompts, temperature=0, max_new_tokens=6)
    assert [pipe(p, temperature=0, max_new_tokens=6).token_ids for p in prompts] == [a.token_ids for a in together]


@needs_torchao
def test_what_is_unknown_or_does_not_work_here_is_refused_by_name(folder):
    with pytest.raises(
        ParameterError, match="no config 'int8_weight'; did you mean 'int8_weight_only'.*Known: .*int4_"
    ):
        load(folder, "torchao:int8_weight")
    with pytest.raises(ParameterError, match="torchao:NAME'. Known: .*int8_weight_only"):
        load(folder, "torchao")
    with pytest.raises(
        UnsupportedError, match="Float8DynamicActivationInt4Weight.* does not work on cpu in torch.bfloat16"
    ):
        load(folder, "torchao:float8_dynamic_activation_int4_weight")


@needs_torchao
def test_quiet(folder):
    root = str(Path(__file__).resolve().parent.parent)
    code = (
        f"import sys; sys.path.insert(0, {root!r})\n"
        "from llama_infer import Pipeline\n"
        f"pipe = Pipeline({str(folder)!r}, quantization='torchao:int8_weight_only', device='cpu', formatter='plain')\n"
        "print(len(pipe('Hi', max_new_tokens=2, min_new_tokens=2).token_ids))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "2", "")


def test_missing_torchao_names_the_pip_line(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else found(name))
    with pytest.raises(MissingDependencyError, match=r"pip install 'llama-infer\[torchao\]'"):
        resolve("quantization", "torchao:int8_weight_only")
