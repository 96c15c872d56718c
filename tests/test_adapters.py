"""LoRA adapters: the oracle is peft's own model, made in memory; what is saved of it must come back, merged or live."""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_header, edit_json, write_checkpoint
from oracles import greedy
from safetensors.torch import load_file, save_file
from test_gptq import quantise

from llama_infer import Pipeline
from llama_infer.cli import main
from llama_infer.errors import LoadingError, MissingDependencyError, UnsafeCheckpointError, UnsupportedError
from llama_infer.models.quantization import prepare_bitsandbytes
from llama_infer.testing import byte_tokenizer, tiny_llama

IDS = torch.tensor([[256, 72, 101, 108, 108, 111]])
TWO = ["embed_tokens", "lm_head"]


def write_adapter(folder: Path, rows: int | None = None, tied: bool = False, **lora: Any) -> Any:
    """Saves a random adapter of the tiny Llama, whose vocabulary may have grown first; returns peft's own model."""
    if importlib.util.find_spec("bitsandbytes"):
        prepare_bitsandbytes()
    import peft

    model = tiny_llama(tie_word_embeddings=tied)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        settings = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, **lora}
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        )
        wrapped.save_pretrained(folder)
    return wrapped.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture
def adapter(tmp_path):
    write_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(base: Path, **options: Any) -> Pipeline:
    return Pipeline(str(base), dtype="float32", formatter="plain", **options)


def test_merged_into_what_was_unpacked(tmp_path, adapter):
    """GPTQ's weights are ordinary ones once they are read."""
    packed, whole = (write_checkpoint(tmp_path / name) for name in ("packed", "whole"))
    exact = quantise(packed, "gptq")
    save_file({**load_file(whole / "model.safetensors"), **{n: w.float() for n, w in exact.items()}},
              whole / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    found, expected = (load(base, adapter=str(adapter)).loaded.model for base in (packed, whole))
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-4, atol=1e-5)


KINDS: dict[str, dict[str, Any]] = {
    "two projections": {},
    "all of them": {"target_modules": "all-linear"},
    "embeddings too": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora": {"use_dora": True},
    "rank-stabilised, with biases": {"use_rslora": True, "bias": "lora_only"},
    "a new head": {"modules_to_save": TWO},
    "a larger vocabulary": {"modules_to_save": TWO, "rows": 280},
    "of a tied model": {"tied": True},
    "which unties": {"modules_to_save": TWO, "rows": 280, "tied": True},
}


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_pefts(tmp_path, kind, merge):
    oracle = write_adapter(tmp_path / "adapter", **KINDS[kind])
    write_checkpoint(tmp_path / "base", tie_word_embeddings=KINDS[kind].get("tied", False))
    pipe = load(tmp_path / "base", adapter=tmp_path / "adapter", merge_adapter=merge)
    torch.testing.assert_close(pipe.loaded.model(IDS).logits, logits(oracle), rtol=0, atol=1e-4 if merge else 0)
    assert type(pipe.loaded.model).__name__ == "LlamaForCausalLM"
    assert any("lora" in name for name, _ in pipe.loaded.model.named_modules()) is not merge
    assert not any(parameter.requires_grad for parameter in pipe.loaded.model.parameters())
    expected = greedy(oracle, IDS[0].tolist(), 8, eos_token_id=[257, 260])
    assert pipe(IDS[0].tolist(), temperature=0, max_new_tokens=8).token_ids == expected
    assert expected != greedy(tiny_llama(tie_word_embeddings=KINDS[kind].get("tied", False)), IDS[0].tolist(), 8)


@pytest.mark.parametrize("kind", ["two projections", "a larger vocabulary", "which unties"])
def test_convert_writes_the_merged_model(tmp_path, kind, capsys):
    """As a merge script does: the result is an ordinary checkpoint, with the tokenizer of the adapter."""
    oracle = write_adapter(tmp_path / "adapter", **KINDS[kind])
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["llama"] if "rows" in KINDS[kind] else [])
    tokenizer.save_pretrained(tmp_path / "adapter")
    write_checkpoint(tmp_path / "base", tie_word_embeddings=KINDS[kind].get("tied", False))
    command = ["convert", str(tmp_path / "base"), str(tmp_path / "merged"), "--adapter", str(tmp_path / "adapter")]
    assert main(command) == 0
    loaded = load(tmp_path / "merged").loaded
    torch.testing.assert_close(loaded.model(IDS).logits, logits(oracle), rtol=0, atol=1e-4)
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_merging_keeps_the_stored_dtype(tmp_path):
    write_adapter(tmp_path / "adapter")
    write_checkpoint(tmp_path / "base", dtype="float16")
    assert main(["convert", str(tmp_path / "base"), str(tmp_path / "new"), "--adapter", str(tmp_path / "adapter")]) == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "float16"


def test_the_tokenizer_of_the_adapter_wins_and_may_be_overruled(base, adapter, tmp_path):
    assert load(base, adapter=adapter).loaded.tokenizer.get_vocab().get("llama") is None
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["llama"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(LoadingError, match="does not belong.*'llama' has the id 264"):
        load(base, adapter=adapter)
    assert load(base, adapter=adapter, tokenizer=str(base)).loaded.tokenizer.get_vocab().get("llama") is None


def test_an_adapter_and_quantised_weights(base, adapter):
    """Merging would round twice: live, the adapter is as exact as without; convert merges beforehand."""
    with pytest.raises(UnsupportedError, match="bnb-nf4.*merge_adapter=False.*convert"):
        load(base, adapter=adapter, quantization="bnb-nf4")
    pipe = load(base, adapter=adapter, quantization="bnb-int8", merge_adapter=False)
    plain = load(base, quantization="bnb-int8").loaded.model(IDS).logits
    merged = load(base, adapter=adapter).loaded.model(IDS).logits
    assert (pipe.loaded.model(IDS).logits - merged).norm() < 0.1 * (plain - merged).norm()


def test_adapters_go_with_packed_layers(base, adapter):
    """bfloat16, the default policy of the processor: live and merged, close to float32."""
    exact = load(base, adapter=adapter).loaded.model(IDS).logits
    for merge in (True, False):
        pipe = Pipeline(str(base), adapter=adapter, merge_adapter=merge, dtype="bfloat16")
        assert (pipe.loaded.model(IDS).logits.float() - exact).norm() < 0.05 * exact.norm()


def test_the_same_adapter_is_shared_and_another_is_not(base, adapter, tmp_path):
    pipe = load(base, adapter=adapter)
    assert load(base, adapter=str(adapter)).loaded is pipe.loaded
    assert pipe.replace(sampler="greedy").loaded is pipe.loaded
    assert load(base).loaded is not pipe.loaded
    assert load(base, adapter=adapter, merge_adapter=False).loaded is not pipe.loaded
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    assert load(base, adapter=other).loaded is not pipe.loaded
    edit_json(adapter / "adapter_config.json", lora_alpha=64)  # the folder is not what it was
    assert load(base, adapter=adapter).loaded is not pipe.loaded
    with pytest.raises(UnsupportedError, match="adapter.*loaded already"):
        Pipeline(tiny_llama(), adapter=str(adapter))


def refusal(base: Path, adapter: Path, kind: type[Exception] = LoadingError) -> str:
    with pytest.raises(kind) as caught:
        load(base, adapter=adapter)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_adapter(base, adapter, tmp_path):
    assert "adapter_config.json" in refusal(base, base)
    assert "no folder" in refusal(base, tmp_path / "nowhere")
    with pytest.raises(LoadingError, match="load its base model with adapter="):
        load(adapter)
    edit_json(adapter / "adapter_config.json", peft_type="PROMPT_TUNING")
    assert "PROMPT_TUNING" in refusal(base, adapter, UnsupportedError)


def test_only_safetensors(base, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin" in refusal(base, adapter, UnsafeCheckpointError)
    (adapter / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors is not there" in refusal(base, adapter)


@pytest.mark.parametrize("field", ["megatron_config", "auto_map"])
def test_code_named_by_an_adapter(base, adapter, field):
    edit_json(adapter / "adapter_config.json", **{field: {"x": "y"}}, megatron_core="evil.module")
    assert field in refusal(base, adapter, UnsafeCheckpointError)


def test_code_named_by_the_tokenizer_of_an_adapter(base, adapter):
    byte_tokenizer().save_pretrained(adapter)
    edit_json(adapter / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    assert "auto_map" in refusal(base, adapter, UnsafeCheckpointError)


def test_damaged_and_foreign_adapters(base, adapter, tmp_path):
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert str(path) in refusal(base, adapter)
    path.write_bytes(whole)
    edit_header(path, lambda header: header.update(x=header.pop(sorted(set(header) - {"__metadata__"})[0])))
    assert "does not fit the model: 2 tensors do not match" in refusal(base, adapter)
    path.write_bytes(whole)
    wide = write_checkpoint(tmp_path / "wide", hidden_size=64)
    gc.collect()
    assert "does not fit the model" in refusal(wide, adapter)


def test_without_peft(base, adapter, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else find(name, *more))
    with pytest.raises(MissingDependencyError, match=r"pip install 'llama-infer\[peft\]'"):
        load(base, adapter=adapter)
