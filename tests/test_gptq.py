"""Checkpoints of GPTQ and AWQ, packed here from what the two define: their weights are the numbers' that went in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import edit_json, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import greedy
from safetensors.torch import load_file, save_file

from llama_infer import Pipeline
from llama_infer.errors import LoadingError, UnsupportedError
from llama_infer.models.checks import check_checkpoint
from llama_infer.models.convert import convert
from llama_infer.models.gptq import unpack
from llama_infer.models.packed import refusal

WORD = 1 << 32


def words(numbers):
    """Numbers and their bits, the first the lowest, as int32: one long integer, cut into words."""
    whole = at = 0
    for number, bits in numbers:
        whole, at = whole | int(number) << at, at + bits
    return [(whole >> 32 * i) % WORD - (WORD if whole >> 32 * i + 31 & 1 else 0) for i in range(at // 32)]


def tensor(rows):
    return torch.tensor(rows, dtype=torch.int32)


def gptq(numbers, zeros, scales, bits, index=None, format="gptq", groups=None):
    """numbers [out, in], zeros and scales [out, groups]."""
    below = 1 if format == "gptq" else 0
    stored = [[((int(zero) - below) % (1 << bits), bits) for zero in group] for group in zeros.t()]
    held = {
        "qweight": tensor([words([(number, bits) for number in row]) for row in numbers]).t().contiguous(),
        "qzeros": tensor([words(group) for group in stored]),
        "scales": scales.t().contiguous(),
    }
    return held if index is None else {**held, "g_idx": index.int()}


def awq(numbers, zeros, scales):
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(rows):
        eights = [[row[first : first + 8] for first in range(0, len(row), 8)] for row in rows.tolist()]
        return tensor([[words([(eight[at], 4) for at in order])[0] for eight in row] for row in eights])

    return {"qweight": pack(numbers.t()), "qzeros": pack(zeros.t()), "scales": scales.t().contiguous()}


def definition(numbers, zeros, scales, index):
    """float64 [out, in]."""
    return (numbers.double() - zeros.double()[:, index]) * scales.double()[:, index]


def draw(outputs, inputs, groups, bits, seed, least=0):
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 1 << bits, (outputs, inputs), generator=random)
    zeros = torch.randint(least, 1 << bits, (outputs, groups), generator=random)
    return numbers, zeros, (torch.rand(outputs, groups, generator=random) * 0.02).half()


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.booleans(),
       st.sampled_from(["gptq", "gptq_v2"]), st.integers(0, 99))  # fmt: skip
def test_gptq_is_its_definition(bits, outputs, inputs, groups, ordered, form, seed):
    outputs, inputs = 32 * outputs, 96 * inputs * groups
    numbers, zeros, scales = draw(outputs, inputs, groups, bits, seed)
    index = torch.arange(inputs) // (inputs // groups)
    index = index if ordered else index[torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))]
    held = gptq(numbers, zeros, scales, bits, None if ordered and seed % 2 else index, form)
    described = {"quant_method": "gptq", "bits": bits, "checkpoint_format": form}
    exact = definition(numbers, zeros, scales, index)
    torch.testing.assert_close(unpack(held, described, torch.float32).double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(unpack(held, described, torch.bfloat16).double(), exact, rtol=2**-8, atol=0)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_awq_is_its_definition(outputs, size, groups, seed):
    numbers, zeros, scales = draw(8 * outputs, size * groups, groups, 4, seed)
    index = torch.arange(size * groups) // size
    found = unpack(awq(numbers, zeros, scales), {"quant_method": "awq", "bits": 4}, torch.float32)
    torch.testing.assert_close(found.double(), definition(numbers, zeros, scales, index), rtol=1e-6, atol=0)


def test_layers_larger_than_what_is_unpacked_at_a_time(monkeypatch):
    monkeypatch.setattr("llama_infer.models.gptq._BLOCK", 16 * 96)
    numbers, zeros, scales = draw(40, 96, 1, 4, 0)
    exact = definition(numbers, zeros, scales, torch.zeros(96, dtype=torch.long))
    for held, method in ((gptq(numbers, zeros, scales, 4), "gptq"), (awq(numbers, zeros, scales), "awq")):
        found = unpack(held, {"quant_method": method, "bits": 4}, torch.float32)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def quantise(folder: Path, method: str, bits: int = 4, group: int = 32, **described: object) -> dict[str, torch.Tensor]:
    """Rounds a checkpoint's layers where it is, but for its head; what they stand for, by name, in float64."""
    held = load_file(folder / "model.safetensors")
    exact = {}
    for name in [name for name in held if name.endswith(("proj.weight", "w1.weight", "w2.weight", "w3.weight"))]:
        weight = held.pop(name).float()
        groups = weight.unflatten(1, (-1, group))
        scales = ((groups.amax(-1) - groups.amin(-1)) / ((1 << bits) - 1)).half()
        zeros = (-groups.amin(-1) / scales.float()).round().clamp(0, (1 << bits) - 1)
        index = torch.arange(weight.shape[1]) // group
        if described.get("desc_act"):
            index = index.roll(5)
            weight = weight.roll(5, 1)
        numbers = (weight / scales.float()[:, index] + zeros[:, index]).round().clamp(0, (1 << bits) - 1).long()
        packed = gptq(numbers, zeros, scales, bits, index) if method == "gptq" else awq(numbers, zeros, scales)
        held.update({name.replace("weight", kind): tensor for kind, tensor in packed.items()})
        exact[name] = definition(numbers, zeros, scales, index)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    described = {"quant_method": method, "bits": bits, "group_size": group, **described}
    edit_json(folder / "config.json", quantization_config=described)
    return exact


@pytest.mark.parametrize(
    ("method", "described"),
    [
        ("gptq", {"checkpoint_format": "gptq"}),
        ("gptq", {"bits": 8, "desc_act": True}),
        ("awq", {"version": "gemm", "zero_point": True}),
    ],
)
def test_weights_and_tokens_are_those_of_the_definition(tmp_path, method, described, capfd):
    from transformers import AutoModelForCausalLM

    for name in "whole", "quantised":
        write_checkpoint(tmp_path / name, hidden_size=128, dtype="float16")
    exact = quantise(tmp_path / "quantised", method, **described)
    assert len(exact) == 14
    capfd.readouterr()
    pipe = Pipeline(str(tmp_path / "quantised"), device="cpu", dtype="float32", formatter="plain")
    assert "".join(capfd.readouterr()) == ""
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    for name, weight in exact.items():
        oracle.get_parameter(name).data = weight.float()
        torch.testing.assert_close(pipe.loaded.model.get_parameter(name).double(), weight, rtol=1e-6, atol=0)
    prompt = [256, *b"Why?"]
    answer = pipe(prompt, temperature=0, max_new_tokens=8)
    assert answer.token_ids == greedy(oracle, prompt, 8, eos_token_id=[257, 260])
    assert check_checkpoint(tmp_path / "quantised").numbers == sum(p.numel() for p in oracle.parameters())
    assert not hasattr(pipe.loaded.model.config, "quantization_config")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_experts_that_become_one_parameter(tmp_path, method):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=64, num_hidden_layers=2, num_local_experts=3, dtype="float16", **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MixtralForCausalLM(config).save_pretrained(tmp_path / "packed")
    shutil.copytree(tmp_path / "packed", tmp_path / "whole")
    exact = quantise(tmp_path / "packed", method)
    assert len(exact) == 2 * (4 + 3 * 3)
    held = load_file(tmp_path / "whole" / "model.safetensors")
    held.update({name: weight.float() for name, weight in exact.items()})
    save_file(held, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    ids = torch.tensor([[1, 2, 3, 4]])
    found, expected = (
        Pipeline(str(tmp_path / name), device="cpu", dtype="float32").loaded.model(ids).logits
        for name in ("packed", "whole")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_unpacked_layers_are_packed_and_not_quantised_again(tmp_path):
    write_checkpoint(tmp_path, hidden_size=128, dtype="float16")
    quantise(tmp_path, "gptq")
    pipe = Pipeline(str(tmp_path), device="cpu")
    here = refusal(torch.device("cpu"), torch.bfloat16) is None
    assert type(pipe.loaded.model.model.layers[0].mlp.up_proj).__name__ in (
        ("PackedLinear", "TiledLinear") if here else ("Linear",)
    )
    with pytest.raises(UnsupportedError, match=r"already quantised \(gptq\)"):
        Pipeline(str(tmp_path), device="cpu", quantization="int8")
    with pytest.raises(UnsupportedError, match=r"quantised \(gptq\), and tp_plan splits whole weights"):
        Pipeline(str(tmp_path), tp_plan="auto")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_converted_to_an_ordinary_checkpoint(tmp_path, method):
    write_checkpoint(tmp_path / "a", hidden_size=128, dtype="float16")
    exact = quantise(tmp_path / "a", method)
    convert(tmp_path / "a", tmp_path / "b")
    held = load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(held[name], weight.float().bfloat16()) for name, weight in exact.items())
    assert len(held) == 21 and check_checkpoint(tmp_path / "b").quantization is None
    Pipeline(str(tmp_path / "b"), device="cpu", quantization="int8")


@pytest.mark.parametrize("size", [0, 1])
def test_biases_of_a_model_without_are_ignored_where_they_are_zero(tmp_path, size):
    write_checkpoint(tmp_path, dtype="float16")
    quantise(tmp_path, "gptq")
    held = load_file(tmp_path / "model.safetensors")
    held["model.layers.1.mlp.up_proj.bias"] = torch.full((len(held["model.norm.weight"]),), size).half()
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if not size:
        assert Pipeline(str(tmp_path), device="cpu")("Hi", max_new_tokens=2).token_ids
        return
    with pytest.raises(LoadingError, match="belong to no part of the model .model.layers.1.mlp.up_proj.bias"):
        Pipeline(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"quant_method": "awq", "version": "gemv"}, "awq in the format 'gemv'; known: gemm"),
        ({"quant_method": "awq", "backend": "llm-awq"}, "awq in the format 'llm-awq'"),
        ({"quant_method": "awq", "bits": 8}, "awq in 8 bits; known: 4"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq in the format 'marlin'; known: gptq, gptq_v2"),
        ({"quant_method": "gptq", "bits": 5}, "gptq in 5 bits; known: 2, 3, 4, 8"),
    ],
)
def test_formats_that_are_not_read_are_refused_by_name(tmp_path, described, message):
    write_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"bits": 4, **described})
    with pytest.raises(UnsupportedError, match=message):
        Pipeline(str(tmp_path), device="cpu")


@pytest.mark.parametrize("kind", ["qweight", "qzeros", "scales", "g_idx"])
@pytest.mark.parametrize("absent", [True, False])
def test_layers_that_do_not_fit_are_refused(tmp_path, kind, absent):
    write_checkpoint(tmp_path, dtype="float16")
    quantise(tmp_path, "gptq")
    held = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{kind}"
    if absent:
        del held[name]
    else:
        held[name] = held[name][:-1].clone()
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if absent and kind == "g_idx":  # groups follow each other
        assert Pipeline(str(tmp_path), device="cpu")("Hi", max_new_tokens=2).token_ids
        return
    with pytest.raises(LoadingError, match="model.layers.1.mlp.up_proj"):
        Pipeline(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qweight", lambda held: held.short(), r"qweight \[16, 128\] I16"),
        ("qzeros", lambda held: held.float(), r"qzeros \[4, 16\] F32"),
        ("scales", lambda held: held.int(), r"scales \[4, 128\] I32"),
        ("g_idx", lambda held: held.float(), r"g_idx \[128\] F32"),
        ("weight", lambda _: torch.zeros(128, 128), r"weight \[128, 128\] F32, qweight"),
        ("g_idx", lambda held: held - 1, "g_idx in .* names groups from -1 to 2, and the layer has 4"),
        ("g_idx", lambda held: held.long() + 1, "names groups from 1 to 4, and the layer has 4"),
    ],
)
def test_layers_of_other_types_or_groups_are_refused(tmp_path, kind, change, message):
    """What would load, as other weights."""
    write_checkpoint(tmp_path, hidden_size=128, dtype="float16")
    quantise(tmp_path, "gptq")
    held = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.1.self_attn.q_proj.{kind}"
    held[name] = change(held.get(name)).contiguous()
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadingError, match=f"model.layers.1.self_attn.q_proj.*{message}"):
        Pipeline(str(tmp_path), device="cpu")


def test_three_bits_that_fill_no_words_are_refused(tmp_path):
    write_checkpoint(tmp_path, hidden_size=128, dtype="float16")
    quantise(tmp_path, "gptq", 3)
    held = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    held[f"{name}.qweight"] = held[f"{name}.qweight"][:-1].clone()
    held[f"{name}.g_idx"] = held[f"{name}.g_idx"][: len(held[f"{name}.qweight"]) * 32 // 3].clone()
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadingError, match=f"{name} is no layer of gptq: it has qweight .11, 128. I32"):
        Pipeline(str(tmp_path), device="cpu")
