"""bitsandbytes on the CPU: it runs, it is accurate, it is quiet, and it fetches nothing."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import edit_json, write_checkpoint
from transformers import LlamaForCausalLM

from llama_infer import Pipeline
from llama_infer.errors import LoadingError, MissingDependencyError, ParameterError, UnsupportedError
from llama_infer.models.loaders import AutoLoader
from llama_infer.models.quantization import BitsAndBytesInt8, BitsAndBytesNF4, _hidden
from llama_infer.parts import Source

IDS = torch.tensor([[256, *b"Why must we reduce pollution?"]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("quantization"), hidden_size=128, dtype="bfloat16")


def logits(folder, quantization, **options):
    loaded = AutoLoader()(Source(str(folder), quantization=quantization, device="cpu", **options))
    return loaded.model(IDS).logits.double(), loaded.model


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_int8_is_close_to_bfloat16(folder):
    whole, _ = logits(folder, "none")
    quantised, model = logits(folder, "bnb-int8")
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.int8 and model.lm_head.weight.dtype == torch.bfloat16
    assert 0 < relative(quantised, whole) < 0.08
    assert (quantised.argmax(-1) == whole.argmax(-1)).double().mean() > 0.8


def test_int8_without_threshold_does_not_look_at_neighbours(folder):
    _, model = logits(folder, BitsAndBytesInt8(threshold=0))
    together = model(IDS.repeat(3, 1)).logits[0]
    assert relative(together.double(), model(IDS).logits[0].double()) < 0.01
    assert model.config.quantization_config.llm_int8_threshold == 0


@pytest.mark.parametrize(
    ("hidden_size", "kind"), [(128, "nf4"), (96, "nf4"), (48, "nf4"), (96, "fp4")]
)  # the AVX-512 layout holds the first only
def test_4_bits_are_the_arithmetic_of_their_dequantised_weights(tmp_path, hidden_size, kind):
    import bitsandbytes

    write_checkpoint(tmp_path, hidden_size=hidden_size, dtype="bfloat16")
    quantised, model = logits(tmp_path, f"bnb-{kind}")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    config = model.config.quantization_config
    assert config.bnb_4bit_quant_type == kind and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    whole, reference = logits(tmp_path, "none")
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed, state = bitsandbytes.functional.quantize_4bit(
                module.weight.data, quant_type=kind, compress_statistics=True
            )
            module.weight.data = bitsandbytes.functional.dequantize_4bit(packed, state).to(torch.bfloat16)
    dequantised = reference(IDS).logits.double()
    assert len(Pipeline(model, formatter="plain")([1, 2], max_new_tokens=3, min_new_tokens=3).token_ids) == 3
    assert relative(quantised, dequantised) < 0.05 < relative(quantised, whole)


@pytest.mark.parametrize("hidden_size", [128, 48])
def test_a_quantised_model_that_was_saved_loads_again(tmp_path, hidden_size):
    before, model = logits(write_checkpoint(tmp_path / "whole", hidden_size=hidden_size), "bnb-nf4")
    model.save_pretrained(tmp_path / "quantised")
    after, again = logits(tmp_path / "quantised", None)
    assert type(again.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert relative(after, before) < 0.05


@pytest.mark.parametrize("policy", [BitsAndBytesInt8, BitsAndBytesNF4])
def test_missing_bitsandbytes_names_the_pip_line(monkeypatch, policy):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match="pip install 'bitsandbytes"):
        policy().options(Source("demo"))


@pytest.mark.parametrize("method", ["torchao", "compressed-tensors"])
def test_a_quantised_checkpoint_names_what_reads_it(tmp_path, monkeypatch, method):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("torchao", "compressed_tensors") else found(name)
    )
    write_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(MissingDependencyError, match=f"{method} needs: pip install {method}$"):
        logits(tmp_path, None)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({"quant_method": "foo", "bits": 4}, "is quantised by 'foo', which transformers does not know. Known: .*hqq"),
        ({"quant_method": "hqqq"}, "'hqqq', .* did you mean 'hqq'"),
        ({"bits": 4}, "names no 'quant_method'; if its weights are whole, take 'quantization_config' out"),
        ({"quant_method": "quark"}, "Quark"),  # known to transformers, whose package is not here
    ],
)
def test_a_method_that_cannot_be_read_is_refused_over_whole_weights_too(tmp_path, monkeypatch, described, expected):
    """transformers would pass over it with a warning, and take the numbers as they lie."""
    write_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=described)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", lambda *ignored: pytest.fail("a model was made"))
    with pytest.raises(LoadingError, match=expected) as caught:
        logits(tmp_path, None)
    assert "\n" not in str(caught.value)


def test_older_checkpoints_of_bitsandbytes_name_no_method(folder, tmp_path):
    before, model = logits(folder, "bnb-int8")
    model.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"load_in_8bit": True})
    with pytest.raises(UnsupportedError, match=r"already quantised \(bitsandbytes\)"):
        logits(tmp_path, "int8")
    assert relative(logits(tmp_path, None)[0], before) < 0.05


@pytest.mark.parametrize("bits", [4, 8])
def test_whole_weights_that_are_said_to_be_bitsandbytes(tmp_path, bits):
    """transformers would load them, and fail in the first forward."""
    write_checkpoint(tmp_path)
    described = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    edit_json(tmp_path / "config.json", quantization_config=described)
    with pytest.raises(LoadingError, match="bitsandbytes.*whole.*take 'quantization_config' out"):
        logits(tmp_path, None)


@pytest.mark.parametrize("threshold", [-1.0, float("nan")])
def test_threshold_is_checked(threshold):
    with pytest.raises(ParameterError, match="0 <= threshold"):
        BitsAndBytesInt8(threshold=threshold)


@pytest.mark.parametrize("before", [{}, {"hideable": sys}])
def test_a_hidden_package_comes_back(monkeypatch, before):
    for name, module in before.items():
        monkeypatch.setitem(sys.modules, name, module)
    with _hidden("hideable"), pytest.raises(ImportError):
        importlib.import_module("hideable")
    assert {name: module for name, module in sys.modules.items() if name == "hideable"} == before


def test_quiet_and_without_code_from_the_hub(folder, tmp_path):
    """In a fresh process, with a package ``kernels`` that reports when it is asked to fetch something."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*a, **k):\n    raise SystemExit('fetched')\n")
    root = str(Path(__file__).resolve().parent.parent)
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {root!r}]\n"
        "import torch\n"
        "from llama_infer.models.loaders import AutoLoader\n"
        "from llama_infer.parts import Source\n"
        "for policy in ('bnb-int8', 'bnb-nf4'):\n"
        f"    model = AutoLoader()(Source({str(folder)!r}, quantization=policy, device='cpu')).model\n"
        "    model(torch.tensor([[256, 72, 105]]))\n"
        "import kernels; print(kernels.get_kernel.__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "get_kernel", "")
